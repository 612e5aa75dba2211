"""Image classification: ResNet-18 with batch normalisation on 32x32 colour images.

The LRTuner paper and Kim and Yu train it on CIFAR-10.

Source: K. He et al., "Deep Residual Learning for Image Recognition", 2015, in the form for CIFAR that the
LRTuner paper uses (github.com/kuangliu/pytorch-cifar): 11,173,962 parameters for ten classes, a first
convolution of 3x3 without pooling, and training images that are shifted by up to four pixels and mirrored
at random.
Held-out images are normalised by the statistics of a fixed part of the training images, as in
:mod:`experiments.tasks.batch_norm`, instead of by running averages.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.tasks.base import Batch, Collector, Params, Task
from experiments.tasks.convolution import convolution
from experiments.tasks.images import load_public_images
from experiments.tasks.networks import accuracy, cross_entropy, dense, init_dense

_WIDTHS, _BLOCKS = (64, 128, 256, 512), 2
_REFERENCE = 512  # training images that held-out ones are normalised by
_CHUNK = 250  # held-out images in memory at a time
_EPSILON = 1e-5
_SHIFT = 4  # pixels

Statistics = list[tuple[jax.Array, jax.Array]]  # mean and variance of each channel, a pair for each layer


def _init_layer(key: jax.Array, size: int, inputs: int, outputs: int) -> Params:
    kernel = jax.nn.initializers.he_normal()(key, (size, size, inputs, outputs))
    return {"kernel": kernel, "scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)}


def _init_block(key: jax.Array, inputs: int, outputs: int) -> Params:
    keys = jax.random.split(key, 3)
    block = {
        "first": _init_layer(keys[0], 3, inputs, outputs),
        "second": _init_layer(keys[1], 3, outputs, outputs),
    }
    if inputs != outputs:
        block["project"] = _init_layer(keys[2], 1, inputs, outputs)
    return block


def init(key: jax.Array, classes: int) -> Params:
    """Initial parameters, by He's normal initialization."""
    keys = iter(jax.random.split(key, 2 + _BLOCKS * len(_WIDTHS)))
    stem = _init_layer(next(keys), 3, 3, _WIDTHS[0])
    blocks, inputs = [], _WIDTHS[0]
    for width in _WIDTHS:
        for _ in range(_BLOCKS):
            blocks.append(_init_block(next(keys), inputs, width))
            inputs = width
    return {"stem": stem, "blocks": blocks, "logits": init_dense(next(keys), inputs, classes)}


def apply(params: Params, images: jax.Array, given: Statistics | None = None) -> tuple[jax.Array, Statistics]:
    """Logits, normalised by given statistics or by those of the batch, and these statistics."""
    statistics: Statistics = []

    def layer(layer_params: Params, hidden: jax.Array, stride: int = 1) -> jax.Array:
        hidden = convolution(
            hidden,
            layer_params["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        own = (hidden.mean(axis=(0, 1, 2)), hidden.var(axis=(0, 1, 2)))
        mean, variance = own if given is None else given[len(statistics)]
        statistics.append((mean, variance))
        normalized = (hidden - mean) * jax.lax.rsqrt(variance + _EPSILON)
        return layer_params["scale"] * normalized + layer_params["bias"]

    hidden = jax.nn.relu(layer(params["stem"], images))
    for block in params["blocks"]:
        stride = 2 if "project" in block else 1
        skip = layer(block["project"], hidden, stride) if "project" in block else hidden
        inner = jax.nn.relu(layer(block["first"], hidden, stride))
        hidden = jax.nn.relu(skip + layer(block["second"], inner))
    return dense(params["logits"], hidden.mean(axis=(1, 2))), statistics


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image by up to four pixels in each direction and mirrors half of them."""
    shift_key, mirror_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (len(images), 2), 0, 2 * _SHIFT + 1)
    padded = jnp.pad(images, ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)))
    shape = images.shape[1:]
    shifted = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), shape))(
        padded, shifts
    )
    mirrors = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrors, shifted[:, :, ::-1], shifted)


def _collect(key: jax.Array, params: Params, batch: Batch) -> tuple[jax.Array, Batch]:
    del params
    key, own = jax.random.split(key)
    return key, batch | {"input": augment(own, batch["input"])}


def make(name: str, data: str, classes: int, batch_size: int, data_dir: Path | None = None) -> Task:
    """ResNet-18 on a public set of 32x32 colour images."""
    train, test = (load_public_images(data, split, data_dir) for split in ("train", "test"))
    reference = train["input"][:_REFERENCE]

    def held_out(params: Params, batch: Batch) -> jax.Array:
        _, statistics = apply(params, reference)
        logits = lambda image: apply(params, image[None], statistics)[0][0]  # noqa: E731
        return jax.lax.map(logits, batch["input"], batch_size=min(_CHUNK, len(batch["input"])))

    return Task(
        name,
        init=lambda key: init(key, classes),
        loss=lambda params, batch: cross_entropy(apply(params, batch["input"])[0], batch["label"]),
        metric=lambda params, batch: accuracy(held_out(params, batch), batch["label"]),
        metric_name="accuracy",
        train=train,
        test=test,
        batch_size=batch_size,
        test_loss=lambda params, batch: cross_entropy(held_out(params, batch), batch["label"]),
        collector=Collector(lambda key, params: key, _collect),
    )
