"""Autoencoders: a plain one of signals and a variational one of the digits.

Source of the second: D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", 2014.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import init_mlp, mlp
from experiments.tasks.variants import load_flat

_HIDDEN, _LATENT = 64, 8
_COPIES = 16  # of each example, each with a seed of its own


def _init(size: int, codes: int):
    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key)
        return {
            "encoder": init_mlp(keys[0], (size, _HIDDEN, codes)),
            "decoder": init_mlp(keys[1], (_LATENT, _HIDDEN, size)),
        }

    return init


def _load(data: str, data_dir: Path | None) -> tuple[Batch, Batch]:
    train, test = ({"input": load_flat(data, split, data_dir)["input"]} for split in ("train", "test"))
    return train, test


def make_plain(name: str, data: str, data_dir: Path | None = None) -> Task:
    """Eight codes; the metric is the squared error of what is decoded over the variance of the inputs."""
    train, test = _load(data, data_dir)
    variance = float(train["input"].var(axis=0).mean())

    def loss(params: Params, batch: Batch) -> jax.Array:
        decoded = mlp(params["decoder"], mlp(params["encoder"], batch["input"]))
        return jnp.mean((decoded - batch["input"]) ** 2) / variance

    init = _init(train["input"].shape[1], _LATENT)
    return Task(name, init, loss, loss, "relative squared error", train, test, 64, measure="loss")


def make_variational(name: str, data: str, data_dir: Path | None = None) -> Task:
    """Eight Gaussian codes, Bernoulli pixels; the loss is the negative evidence bound, in nats."""
    rng = np.random.default_rng(0)
    train, test = (
        {
            "input": np.tile(examples["input"], (_COPIES, 1)),
            "seed": rng.integers(0, 2**32, _COPIES * len(examples["input"]), dtype=np.uint32),
        }
        for examples in _load(data, data_dir)
    )

    def loss(params: Params, batch: Batch) -> jax.Array:
        mean, log_deviation = jnp.split(mlp(params["encoder"], batch["input"]), 2, axis=1)
        normal = lambda seed: jax.random.normal(jax.random.key(seed), (_LATENT,))  # noqa: E731
        codes = mean + jnp.exp(log_deviation) * jax.vmap(normal)(batch["seed"])
        logits = mlp(params["decoder"], codes)
        reconstruction = jnp.sum(jax.nn.softplus(logits) - batch["input"] * logits, axis=1)
        divergence = 0.5 * (mean**2 + jnp.exp(2 * log_deviation) - 1) - log_deviation
        return jnp.mean(reconstruction + divergence.sum(axis=1))

    init = _init(train["input"].shape[1], 2 * _LATENT)
    return Task(name, init, loss, loss, "negative evidence bound", train, test, 64, measure="loss")
