"""Image classification: a small convolutional network on the 8x8 digits."""

from pathlib import Path

import jax
from flax import nnx

from experiments.tasks.base import CLASSIFICATION, Task, module_task
from experiments.tasks.convolution import convolution
from experiments.tasks.images import load_digits


class DigitsCnn(nnx.Module):
    """Two convolutions and a linear layer, 3,818 parameters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs, conv_general_dilated=convolution)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs, conv_general_dilated=convolution)
        self.logits = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10), of images of shape (batch, 8, 8, 1)."""
        hidden = nnx.relu(self.first(images))
        hidden = nnx.relu(self.second(hidden))
        return self.logits(hidden.reshape(hidden.shape[0], -1))


def make(data_dir: Path | None = None) -> Task:
    """Classification of the 8x8 digits."""
    splits = (load_digits(split, data_dir) for split in ("train", "test"))
    return module_task("digits", lambda rngs: DigitsCnn(rngs=rngs), CLASSIFICATION, *splits, batch_size=64)
