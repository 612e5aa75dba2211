"""Image segmentation: a U-Net on the digit scenes.

Source: O. Ronneberger et al., "U-Net", 2015; smaller, with padded convolutions and bilinear upsampling.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.scenes import DigitScenes
from experiments.tasks.base import CLASSIFICATION, Batch, Task, module_task
from experiments.tasks.convolution import convolution

CLASSES = 11  # the background and ten digits
_WIDTHS = (8, 12, 16)


class Stage(nnx.Module):
    """Two convolutions with ReLU."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs, conv_general_dilated=convolution)
        self.second = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs, conv_general_dilated=convolution)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features at the same resolution."""
        return nnx.relu(self.second(nnx.relu(self.first(images))))


class UNet(nnx.Module):
    """An encoder and a decoder over three resolutions, with skip connections."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.down = nnx.List(
            [Stage(low, high, rngs=rngs) for low, high in zip((1, *_WIDTHS), _WIDTHS, strict=False)]
        )
        self.up = nnx.List(
            [Stage(high + low, low, rngs=rngs) for low, high in itertools.pairwise(_WIDTHS)][::-1]
        )
        self.logits = nnx.Conv(_WIDTHS[0], CLASSES, (1, 1), rngs=rngs, conv_general_dilated=convolution)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of each pixel, shape (batch, height, width, classes)."""
        skips, hidden = [], images
        for index, stage in enumerate(self.down):
            hidden = stage(_max_pool(hidden) if index else hidden)
            skips.append(hidden)
        for stage, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            upsampled = jax.image.resize(hidden, (*skip.shape[:3], hidden.shape[3]), "bilinear")
            hidden = stage(jnp.concatenate([upsampled, skip], axis=-1))
        return self.logits(hidden)


def _max_pool(images: jax.Array) -> jax.Array:
    """2x2 max pooling by a reshape; the gradient of ``reduce_window`` is slow on a CPU."""
    batch, height, width, channels = images.shape
    return images.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def _mean_iou(module: UNet, batch: Batch) -> jax.Array:
    """Intersection over union, averaged over the classes that occur, including the background."""
    predicted = jnp.argmax(module(batch["input"]), axis=-1)
    classes = jnp.arange(CLASSES)[:, None]
    is_predicted, is_true = predicted.reshape(-1) == classes, batch["label"].reshape(-1) == classes
    union = jnp.sum(is_predicted | is_true, axis=1)
    overlap = jnp.sum(is_predicted & is_true, axis=1) / jnp.maximum(union, 1)
    return jnp.sum(overlap) / jnp.maximum(jnp.sum(union > 0), 1)


def make(data_dir: Path | None = None) -> Task:
    """Segmentation of 32x32 scenes."""

    def load(split: str) -> Batch:
        scenes = load_split(DigitScenes, split, data_dir)
        return {"input": scenes["image"].astype("float32") / 16, "label": scenes["mask"].astype("int32")}

    return module_task(
        "segmentation",
        lambda rngs: UNet(rngs=rngs),
        CLASSIFICATION._replace(metric=_mean_iou, metric_name="mean IoU"),
        load("train"),
        load("test"),
        batch_size=4,
    )
