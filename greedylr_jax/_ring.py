"""A ring buffer of the last values of a series, and their mean.

The mean is the pairwise sum of blocks of eight values and of the values after the last whole block, each
block a pairwise sum itself. No sum is carried from one insertion to the next: rounding errors do not
accumulate, and one infinity does not stay (in a running sum it would).

The sums of the blocks are not stored either: on a GPU each array of another shape in a state is a kernel.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from greedylr_jax import _numerics

_BLOCK = 8  # values per block sum


class Ring(NamedTuple):
    """The last values of a series."""

    values: jax.Array  # shape=(size,), dtype=float
    position: jax.Array  # shape=(), dtype=int32; number of values; once full it cycles in [size, 2 * size)


def empty(size: int, dtype: jnp.dtype) -> Ring:
    """Returns a buffer for ``size`` values that holds none."""
    return Ring(
        values=jnp.zeros((size,), dtype),
        position=jnp.zeros((), jnp.int32),
    )


def clear(ring: Ring) -> Ring:
    """Returns the buffer without its values.

    Only the position is reset: overwriting the array under a condition would copy it at every step of a
    ``lax.scan``. From then on :func:`mean` needs ``was_cleared=True`` to ignore the old values.
    """
    return ring._replace(position=jnp.zeros_like(ring.position))


def insert(ring: Ring, value: jax.Array, is_valid: jax.Array) -> Ring:
    """Appends a scalar, in place of the oldest if the buffer is full; does nothing if not ``is_valid``."""
    size = ring.values.size
    # Unsigned: JAX checks whether a signed index is negative.
    position = ring.position.astype(jnp.uint32)
    slot = jnp.minimum(position, position - size)  # the difference wraps around while the buffer fills
    position = position + is_valid.astype(jnp.uint32)
    position = _numerics.where(position == 2 * size, size, position).astype(jnp.int32)

    oldest = jax.lax.dynamic_slice(ring.values, (slot,), (1,))
    newest = _numerics.where(is_valid, value.reshape(1), oldest)
    return Ring(jax.lax.dynamic_update_slice(ring.values, newest, (slot,)), position)


def mean(ring: Ring, *, was_cleared: bool = False) -> jax.Array:
    """Returns the mean of the values, 0 if there are none.

    Args:
      ring: the buffer.
      was_cleared: whether :func:`clear` may have been called; static.
    """
    values, size = ring.values, ring.values.size
    if was_cleared:
        values = _numerics.where(np.arange(size, dtype=np.uint32) < _length(ring), values, 0)
    whole = size // _BLOCK * _BLOCK
    block_sums = _sum(values[:whole].reshape(whole // _BLOCK, _BLOCK).T)
    total = _sum(jnp.concatenate([block_sums, values[whole:]]))
    return total / jnp.maximum(_length(ring), 1).astype(values.dtype)


def _length(ring: Ring) -> jax.Array:
    """The number of values."""
    return jnp.minimum(ring.position, ring.values.size).astype(jnp.uint32)


def _sum(numbers: jax.Array) -> jax.Array:
    """The sum over the first axis, added pairwise if it is short.

    On a CPU each addition of ``jnp.sum`` waits for the previous one.
    """
    if len(numbers) > 3 * _BLOCK:  # unrolling would make a long program
        return jnp.sum(numbers, axis=0)
    terms = [*numbers]
    while len(terms) > 1:
        pairs = list(itertools.zip_longest(terms[::2], terms[1::2]))
        terms = [left if right is None else left + right for left, right in pairs]
    return terms[0]
