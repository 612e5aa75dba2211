"""Factorisation: a matrix of which most entries are missing, and a tensor, from sampled entries."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task

_NOISE = 0.1  # standard deviation; that of the entries themselves is 1
_INIT = 0.3  # standard deviation of the factors' initial entries


def make(name: str, shape: Sequence[int], rank: int, observed: float) -> Task:
    """Factors of an array of low rank, by squared error on entries that are observed with noise.

    Args:
      name: of the task.
      shape: of the array; one factor for each axis.
      rank: of the array and of the factors.
      observed: share of the entries that are training examples; as many as a quarter of them, without noise,
        are the test.
    """
    rng = np.random.default_rng(len(shape))
    factors = [rng.normal(size=(size, rank)) for size in shape]
    entries = np.moveaxis(np.array(np.meshgrid(*map(np.arange, shape), indexing="ij")), 0, -1)
    entries = rng.permutation(entries.reshape(-1, len(shape)))
    values = np.prod([factor[entries[:, axis]] for axis, factor in enumerate(factors)], axis=0).sum(axis=-1)
    values /= values.std()
    count = round(observed * len(entries))
    noisy = values[:count] + _NOISE * rng.normal(size=count)
    split = lambda rows, value: {"input": rows.astype(np.int32), "label": value.astype(np.float32)}  # noqa: E731

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shape))
        return [_INIT * jax.random.normal(k, (size, rank)) for k, size in zip(keys, shape, strict=True)]

    def loss(params: Params, batch: Batch) -> jax.Array:
        rows = [factor[batch["input"][:, axis]] for axis, factor in enumerate(params)]
        return jnp.mean((jnp.prod(jnp.stack(rows), axis=0).sum(axis=-1) - batch["label"]) ** 2)

    held_out = slice(count, count + count // 4)
    return Task(
        name,
        init=init,
        loss=loss,
        metric=loss,
        metric_name="mean squared error",
        train=split(entries[:count], noisy),
        test=split(entries[held_out], values[held_out]),
        batch_size=256,
        measure="loss",
    )
