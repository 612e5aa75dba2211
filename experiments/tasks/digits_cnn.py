"""Image classification: a small convolutional network on the 8x8 digits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.digits import Digits
from experiments.data.loading import load_split
from experiments.tasks.base import Batch, Params, Task
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


def make(data_dir: Path | None = None) -> Task:
    """The task, with its data prepared and in memory."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: DigitsCnn(rngs=nnx.Rngs(0))), nnx.Param)

    def init(key: jax.Array) -> Params:
        return nnx.state(DigitsCnn(rngs=nnx.Rngs(key)), nnx.Param)

    def logits(params: Params, batch: Batch) -> jax.Array:
        return nnx.merge(graph, params)(batch["image"])

    def loss(params: Params, batch: Batch) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["label"])
        return jnp.mean(losses)

    def accuracy(params: Params, batch: Batch) -> jax.Array:
        return jnp.mean(jnp.argmax(logits(params, batch), axis=-1) == batch["label"])

    return Task(
        name="digits",
        init=init,
        loss=loss,
        accuracy=accuracy,
        train=_prepare(load_split(Digits, "train", data_dir)),
        test=_prepare(load_split(Digits, "test", data_dir)),
        batch_size=64,
        learning_rates={"adamw": (1e-4, 1e-3, 1e-2), "sgd": (1e-2, 1e-1, 1.0)},
    )


def _prepare(split: dict[str, np.ndarray]) -> Batch:
    return {
        "image": split["image"].astype(np.float32) / 16,
        "label": split["label"].astype(np.int32),
    }
