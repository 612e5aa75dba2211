"""Perceptrons that differ from the usual ones in a single respect: shape, batch, labels, dtype or units."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.loading import load_split
from experiments.data.mnist1d import Mnist1d
from experiments.tasks.base import LEARNING_RATES, Batch, Params, Task
from experiments.tasks.images import load_digits
from experiments.tasks.networks import accuracy, cross_entropy, init_mlp, mlp

CLASSES = 10


class Variant(NamedTuple):
    """What the perceptron, its data and its units are.

    Attributes:
      data: "digits" (8x8 pixels) or "mnist1d" (signals of 40 values).
      width: units in each hidden layer.
      depth: number of hidden layers.
      batch_size: examples a step.
      wrong_labels: share of training labels that are replaced by another class, drawn once.
      dtype: of parameters and activations; the loss is computed in float32.
      parameter_unit: the stored parameters are those of the network times this.
      loss_unit: the loss is the cross-entropy times this.
    """

    data: str = "mnist1d"
    width: int = 64
    depth: int = 2
    batch_size: int = 64
    wrong_labels: float = 0.0
    dtype: str = "float32"
    parameter_unit: float = 1.0
    loss_unit: float = 1.0


def load_flat(data: str, split: str, data_dir: Path | None) -> Batch:
    """One split of the digits or of MNIST-1D, inputs as vectors."""
    if data == "digits":
        examples = load_digits(split, data_dir)
        return examples | {"input": examples["input"].reshape(len(examples["input"]), -1)}
    examples = load_split(Mnist1d, split, data_dir)
    return {"input": examples["signal"], "label": examples["label"].astype(np.int32)}


def replace_labels(labels: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Labels of which a share, drawn at random, is replaced by another class."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    replaced = labels.copy()
    replaced[chosen] = (labels[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
    return replaced


def make(name: str, variant: Variant, data_dir: Path | None = None) -> Task:
    """A perceptron on the digits or on MNIST-1D as ``variant`` says."""
    train, test = (load_flat(variant.data, split, data_dir) for split in ("train", "test"))
    train = train | {"label": replace_labels(train["label"], variant.wrong_labels)}
    sizes = [train["input"].shape[1], *[variant.width] * variant.depth, CLASSES]

    def init(key: jax.Array) -> Params:
        stored = lambda leaf: (variant.parameter_unit * leaf).astype(variant.dtype)  # noqa: E731
        return jax.tree.map(stored, init_mlp(key, sizes))

    def logits(params: Params, batch: Batch) -> jax.Array:
        if variant.parameter_unit != 1:
            params = jax.tree.map(lambda leaf: leaf / variant.parameter_unit, params)
        return mlp(params, jnp.asarray(batch["input"], variant.dtype))

    # A rate has the unit of the parameters; that of an update which is proportional to the gradient is its
    # square over the unit of the loss.
    unit, squared = variant.parameter_unit, variant.parameter_unit**2 / variant.loss_unit
    return Task(
        name,
        init=init,
        loss=lambda params, batch: variant.loss_unit * cross_entropy(logits(params, batch), batch["label"]),
        metric=lambda params, batch: accuracy(logits(params, batch), batch["label"]),
        metric_name="accuracy",
        train=train,
        test=test,
        batch_size=variant.batch_size,
        learning_rates={
            optimizer: tuple((squared if optimizer in ("sgd", "momentum") else unit) * rate for rate in rates)
            for optimizer, rates in LEARNING_RATES.items()
        },
    )
