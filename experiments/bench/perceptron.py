"""The multilayer perceptron that benchmarks train: ReLU, no biases, any widths."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = list[jax.Array]


def make(widths: tuple[int, ...], leading: tuple[int, ...]) -> tuple[Params, dict[str, jax.Array]]:
    """Returns random weights and a batch of random examples.

    Args:
      widths: of the input, the hidden layers and the output.
      leading: leading axes of the examples: ``(batch,)``, or ``(batches, batch)``.
    """
    keys = jax.random.split(jax.random.key(0), len(widths) + 1)
    params = [
        jax.random.normal(key, (rows, columns)) * np.sqrt(2 / rows)
        for key, (rows, columns) in zip(keys, itertools.pairwise(widths), strict=False)
    ]
    return params, {
        "x": jax.random.normal(keys[-2], (*leading, widths[0])),
        "y": jax.random.randint(keys[-1], leading, 0, widths[-1]),
    }


def loss(params: Params, batch: dict[str, Any]) -> jax.Array:
    """Mean cross-entropy."""
    hidden = batch["x"]
    for weights in params[:-1]:
        hidden = jax.nn.relu(hidden @ weights)
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params[-1], batch["y"])
    return jnp.mean(losses)
