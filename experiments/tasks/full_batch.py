"""Logistic regression on tables of scikit-learn with all training examples in each step."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import classification_task, dense, init_dense

_PENALTY = (
    1e-3  # times the squared norm of the weights; without it the classes of both tables can be separated
)
TABLES = {"cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}


def make(name: str, table: str) -> Task:
    """Multinomial logistic regression on standardized features; three tenths are the test."""
    loaded = TABLES[table]()
    inputs, test_inputs, labels, test_labels = train_test_split(
        loaded.data, loaded.target, test_size=0.3, random_state=0, stratify=loaded.target
    )
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    scaled = lambda rows: ((rows - mean) / deviation).astype(np.float32)  # noqa: E731
    train = {"input": scaled(inputs), "label": labels.astype(np.int32)}
    test = {"input": scaled(test_inputs), "label": test_labels.astype(np.int32)}
    init = lambda key: init_dense(key, inputs.shape[1], len(loaded.target_names))  # noqa: E731
    task = classification_task(name, init, dense, train, test, batch_size=len(labels))

    def loss(params: Params, batch: Batch) -> jax.Array:
        return task.loss(params, batch) + _PENALTY * jnp.sum(params["kernel"] ** 2)

    return task._replace(
        loss=loss, metric=task.loss, metric_name="cross-entropy", measure="loss", test_loss=task.loss
    )
