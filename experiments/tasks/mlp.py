"""Multilayer perceptrons on the digits and on MNIST-1D: small tasks, for sweeps of many runs."""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.mnist1d import Mnist1d
from experiments.tasks.base import CLASSIFICATION, Batch, Task, module_task
from experiments.tasks.images import load_digits


class Mlp(nnx.Module):
    """Two hidden layers with ReLU."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10)."""
        hidden = nnx.relu(self.first(inputs.reshape(inputs.shape[0], -1)))
        return self.logits(nnx.relu(self.second(hidden)))


class ResidualMlp(nnx.Module):
    """Three residual blocks with layer normalisation."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(inputs, hidden, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(hidden, rngs=rngs) for _ in range(3)])
        self.blocks = nnx.List([nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(3)])
        self.logits = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10)."""
        hidden = self.embed(inputs)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + nnx.gelu(block(norm(hidden)))
        return self.logits(hidden)


def make_digits(data_dir: Path | None = None) -> Task:
    """Digits: 64 inputs, 32 hidden units, 3,466 parameters."""
    splits = (load_digits(split, data_dir) for split in ("train", "test"))
    return module_task(
        "digits-mlp", lambda rngs: Mlp(64, 32, rngs=rngs), CLASSIFICATION, *splits, batch_size=64
    )


def make_mnist1d(data_dir: Path | None = None) -> Task:
    """MNIST-1D: 40 inputs, 64 hidden units, 7,434 parameters."""
    return _mnist1d("mnist1d-mlp", lambda rngs: Mlp(40, 64, rngs=rngs), data_dir)


def make_mnist1d_residual(data_dir: Path | None = None) -> Task:
    """MNIST-1D with residual blocks: 40 inputs, 64 hidden units, 16,138 parameters."""
    return _mnist1d("mnist1d-residual", lambda rngs: ResidualMlp(40, 64, rngs=rngs), data_dir)


def _mnist1d(name: str, make_module: Callable[[nnx.Rngs], nnx.Module], data_dir: Path | None) -> Task:
    def load(split: str) -> Batch:
        examples = load_split(Mnist1d, split, data_dir)
        return {"input": examples["signal"], "label": examples["label"].astype("int32")}

    return module_task(name, make_module, CLASSIFICATION, load("train"), load("test"), batch_size=64)
