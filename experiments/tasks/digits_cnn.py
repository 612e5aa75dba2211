"""Image classification: a small convolutional network on the 8x8 digits."""

from pathlib import Path

import jax
from flax import nnx

from experiments.data.digits import Digits
from experiments.data.loading import load_split
from experiments.tasks.base import Batch, Task
from experiments.tasks.classification import make_classifier
from experiments.tasks.convolution import convolution


class DigitsCnn(nnx.Module):
    """Two convolutions and a linear layer, 3,882 parameters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs, conv_general_dilated=convolution)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs, conv_general_dilated=convolution)
        self.logits = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10), of images of shape (batch, 8, 8, 1)."""
        hidden = nnx.relu(self.first(images))
        hidden = nnx.relu(self.second(hidden))
        return self.logits(hidden.reshape(hidden.shape[0], -1))


def load_digits(split: str, data_dir: Path | None) -> Batch:
    """One split of the digits, pixels from 0 to 1."""
    examples = load_split(Digits, split, data_dir)
    return {"input": examples["image"].astype("float32") / 16, "label": examples["label"].astype("int32")}


def make(data_dir: Path | None = None) -> Task:
    """The task, with its data prepared and in memory."""
    return make_classifier(
        "digits",
        lambda rngs: DigitsCnn(rngs=rngs),
        load_digits("train", data_dir),
        load_digits("test", data_dir),
        batch_size=64,
        learning_rates={
            "adamw": (1e-4, 1e-3, 1e-2),
            "sgd": (1e-2, 1e-1, 1.0),
            "adagrad": (1e-3, 1e-2, 1e-1),
            "adafactor": (1e-4, 1e-3, 1e-2),
        },
    )
