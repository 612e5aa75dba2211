"""Image classification: a residual network with batch normalisation, on the 8x8 digits.

Source: S. Ioffe and C. Szegedy, "Batch Normalization", 2015. Held-out images are normalised by the statistics
of a fixed part of the training images ("precise batch normalisation": Y. Wu and J. Johnson, "Rethinking
'Batch' in BatchNorm", 2021), so there are no running averages.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.convolution import matmul_convolution
from experiments.tasks.images import load_digits
from experiments.tasks.networks import accuracy, cross_entropy, dense, init_dense

_WIDTHS = (8, 16)
_REFERENCE = 512  # training images that held-out ones are normalised by
_EPSILON = 1e-5

Statistics = tuple[jax.Array, jax.Array]  # mean and variance of each channel


def _init_convolution(key: jax.Array, inputs: int, outputs: int) -> Params:
    kernel = jax.nn.initializers.he_normal()(key, (3, 3, inputs, outputs))
    return {"kernel": kernel, "scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)}


def _init(key: jax.Array) -> Params:
    keys = jax.random.split(key, 7)
    narrow, wide = _WIDTHS
    shapes = ((1, narrow), (narrow, narrow), (narrow, narrow), (narrow, wide), (wide, wide), (wide, wide))
    layers = [_init_convolution(key, *shape) for key, shape in zip(keys[:-1], shapes, strict=True)]
    return {"layers": layers, "logits": init_dense(keys[-1], wide, 10)}


def _layer(
    layer: Params, images: jax.Array, stride: int, given: Statistics | None
) -> tuple[jax.Array, Statistics]:
    """A convolution, normalised by given statistics or by those of the batch, and these statistics."""
    hidden = matmul_convolution(images, layer["kernel"], (stride, stride))
    mean, variance = given or (hidden.mean(axis=(0, 1, 2)), hidden.var(axis=(0, 1, 2)))
    normalized = (hidden - mean) * jax.lax.rsqrt(variance + _EPSILON)
    return layer["scale"] * normalized + layer["bias"], (mean, variance)


def _apply(
    params: Params, images: jax.Array, given: list[Statistics] | None = None
) -> tuple[jax.Array, list[Statistics]]:
    """Logits and the statistics of each layer."""
    statistics: list[Statistics] = []

    def layer(hidden: jax.Array, stride: int = 1) -> jax.Array:
        index = len(statistics)
        hidden, seen = _layer(
            params["layers"][index], hidden, stride, None if given is None else given[index]
        )
        statistics.append(seen)
        return hidden

    hidden = jax.nn.relu(layer(images))
    hidden = jax.nn.relu(hidden + layer(jax.nn.relu(layer(hidden))))
    hidden = jax.nn.relu(layer(hidden, stride=2))
    hidden = jax.nn.relu(hidden + layer(jax.nn.relu(layer(hidden))))
    return dense(params["logits"], hidden.mean(axis=(1, 2))), statistics


def make(name: str, data_dir: Path | None = None) -> Task:
    """Two residual blocks of 8 and 16 channels."""
    train, test = (load_digits(split, data_dir) for split in ("train", "test"))
    reference = train["input"][:_REFERENCE]

    def held_out(params: Params, batch: Batch) -> jax.Array:
        _, statistics = _apply(params, reference)
        return _apply(params, batch["input"], statistics)[0]

    return Task(
        name,
        init=_init,
        loss=lambda params, batch: cross_entropy(_apply(params, batch["input"])[0], batch["label"]),
        metric=lambda params, batch: accuracy(held_out(params, batch), batch["label"]),
        metric_name="accuracy",
        train=train,
        test=test,
        batch_size=64,
        test_loss=lambda params, batch: cross_entropy(held_out(params, batch), batch["label"]),
    )
