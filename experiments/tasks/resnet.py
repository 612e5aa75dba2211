"""Image classification: residual networks, on the digits and on public sets.

Source: K. He et al., "Deep Residual Learning for Image Recognition", 2015. Here with group normalisation,
which has no running averages, instead of batch normalisation, and placed before each convolution.
"""

from pathlib import Path

import jax
from flax import nnx

from experiments.tasks.base import CLASSIFICATION, Task, module_task
from experiments.tasks.convolution import convolution
from experiments.tasks.images import load_digits, load_public_images

_GROUPS = 4


class Block(nnx.Module):
    """Two convolutions with a skip connection, which is a projection if the shape changes."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, rngs: nnx.Rngs):
        conv = {"rngs": rngs, "conv_general_dilated": convolution, "use_bias": False}
        self.norm_1 = nnx.GroupNorm(inputs, num_groups=_GROUPS, rngs=rngs)
        self.conv_1 = nnx.Conv(inputs, outputs, (3, 3), strides=strides, **conv)
        self.norm_2 = nnx.GroupNorm(outputs, num_groups=_GROUPS, rngs=rngs)
        self.conv_2 = nnx.Conv(outputs, outputs, (3, 3), **conv)
        same = inputs == outputs and strides == 1
        self.project = None if same else nnx.Conv(inputs, outputs, (1, 1), strides=strides, **conv)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features, at a resolution divided by the strides."""
        hidden = nnx.relu(self.norm_1(images))
        skip = images if self.project is None else self.project(hidden)
        hidden = self.conv_2(nnx.relu(self.norm_2(self.conv_1(hidden))))
        return skip + hidden


class ResNet(nnx.Module):
    """A convolution, stages of residual blocks at decreasing resolutions, and a linear layer."""

    def __init__(self, channels: int, classes: int, width: int, stages: int, blocks: int, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, width, (3, 3), rngs=rngs, conv_general_dilated=convolution)
        layers = []
        for stage in range(stages):
            outputs = width * 2**stage
            for index in range(blocks):
                inputs = outputs // 2 if stage and index == 0 else outputs
                layers.append(Block(inputs, outputs, 2 if stage and index == 0 else 1, rngs=rngs))
        self.blocks = nnx.List(layers)
        self.norm = nnx.GroupNorm(outputs, num_groups=_GROUPS, rngs=rngs)
        self.logits = nnx.Linear(outputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, shape (batch, classes), of images of shape (batch, height, width, channels)."""
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = block(hidden)
        return self.logits(nnx.relu(self.norm(hidden)).mean(axis=(1, 2)))


def make_digits(data_dir: Path | None = None) -> Task:
    """Two stages of one block, 8 and 16 channels, on the 8x8 digits."""
    splits = (load_digits(split, data_dir) for split in ("train", "test"))
    return module_task(
        "digits-resnet",
        lambda rngs: ResNet(1, 10, width=8, stages=2, blocks=1, rngs=rngs),
        CLASSIFICATION,
        *splits,
        batch_size=64,
    )


def make_public(name: str, classes: int, data_dir: Path | None = None) -> Task:
    """Three stages of two blocks, 32 to 128 channels, on a public set of 32x32 colour images."""
    splits = (
        load_public_images(name, split, data_dir, limit) for split, limit in (("train", None), ("test", 2000))
    )
    return module_task(
        f"{name}-resnet",
        lambda rngs: ResNet(3, classes, width=32, stages=3, blocks=2, rngs=rngs),
        CLASSIFICATION,
        *splits,
        batch_size=128,
    )
