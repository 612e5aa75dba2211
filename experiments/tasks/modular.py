"""Arithmetic modulo a prime, learned from a part of the table, with weight decay.

Source: A. Power et al., "Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets", 2022;
the network, one hidden layer with a quadratic activation: A. Gromov, "Grokking modular arithmetic", 2023.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import classification_task, dense, init_dense

_HIDDEN = 128
_PENALTY = 1e-4  # times the squared norm of all parameters
OPERATIONS = {"addition": lambda a, b: a + b, "multiplication": lambda a, b: a * b}


def make(name: str, operation: str, prime: int, share: float) -> Task:
    """One hidden layer on two one-hot operands; the loss has a squared penalty as weight decay.

    Args:
      name: of the task.
      operation: "addition" or "multiplication".
      prime: the modulus.
      share: of the table that is trained on; the rest is the test.
    """
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(prime), np.arange(prime), indexing="ij"))
    label = OPERATIONS[operation](first, second) % prime
    order = np.random.default_rng(0).permutation(prime * prime)
    count = round(share * prime * prime)
    split = lambda rows: {  # noqa: E731
        "input": np.stack([first, second], axis=1)[rows].astype(np.int32),
        "label": label[rows].astype(np.int32),
    }

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        operands = [init_dense(k, prime, _HIDDEN)["kernel"] for k in keys[:2]]
        return {"operands": operands, "logits": init_dense(keys[2], _HIDDEN, prime)}

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        embedded = [kernel[inputs[:, i]] for i, kernel in enumerate(params["operands"])]
        return dense(params["logits"], sum(embedded) ** 2)

    task = classification_task(name, init, apply, split(order[:count]), split(order[count:]), batch_size=256)

    def loss(params: Params, batch: Batch) -> jax.Array:
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return task.loss(params, batch) + _PENALTY * squares

    return task._replace(loss=loss, test_loss=task.loss)
