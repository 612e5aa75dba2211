"""A ring buffer of the last values of a series, with a mean that is cheap in a compiled loop.

Besides the values the buffer holds the sum of each block of eight. An insertion recomputes the sum of one
block; the mean adds the block sums and the values after the last whole block. A window of 50 thus takes 8
additions and 8 more, in place of 50.

No sum is carried from one insertion to the next: rounding errors do not accumulate, and one infinity does not
stay (in a running sum it would).

With a window of 50, an AdamW step of 100 parameters under ``lax.scan`` takes 1.46 times as long as without
the rule; with a plain sum of 50 values it takes 1.53 times as long (JAX 0.10, CPU).
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from greedylr_jax import _numerics

_BLOCK = 8  # values per block sum


class Ring(NamedTuple):
    """The last values of a series."""

    values: jax.Array  # shape=(size,), dtype=float
    block_sums: jax.Array  # shape=(size // 8 or 1,), dtype=float
    position: jax.Array  # shape=(), dtype=int32; number of values; once full it cycles in [size, 2 * size)


def empty(size: int, dtype: jnp.dtype) -> Ring:
    """Returns a buffer for ``size`` values that holds none."""
    return Ring(
        values=jnp.zeros((size,), dtype),
        block_sums=jnp.zeros((size // _BLOCK or 1,), dtype),
        position=jnp.zeros((), jnp.int32),
    )


def clear(ring: Ring) -> Ring:
    """Returns the buffer without its values.

    Only the position is reset: overwriting the arrays under a condition would copy the whole buffer at every
    step of a ``lax.scan``. From then on :func:`insert` and :func:`mean` need ``was_cleared=True`` to ignore
    the old values.
    """
    return ring._replace(position=jnp.zeros_like(ring.position))


def insert(ring: Ring, value: jax.Array, is_valid: jax.Array, *, was_cleared: bool = False) -> Ring:
    """Appends a value, in place of the oldest if the buffer is full; does nothing if not ``is_valid``.

    Args:
      ring: the buffer.
      value: a scalar.
      is_valid: a boolean scalar.
      was_cleared: whether :func:`clear` may have been called; static.

    Returns:
      The buffer with the value.
    """
    size = ring.values.size
    # Unsigned: JAX checks whether a signed index is negative.
    position = ring.position.astype(jnp.uint32)
    slot = jnp.minimum(position, position - size)  # the difference wraps around while the buffer fills
    position = position + is_valid.astype(jnp.uint32)
    position = _numerics.where(position == 2 * size, size, position).astype(jnp.int32)

    oldest = jax.lax.dynamic_slice(ring.values, (slot,), (1,))
    newest = _numerics.where(is_valid, value.reshape(1), oldest)
    values = jax.lax.dynamic_update_slice(ring.values, newest, (slot,))
    ring = ring._replace(values=values, position=position)
    num_blocks = size // _BLOCK
    if not num_blocks:
        return ring
    # A slot after the last whole block leaves all block sums as they are; the last one is recomputed.
    block = jnp.minimum(jax.lax.div(slot, np.uint32(_BLOCK)), num_blocks - 1)
    start = block * _BLOCK
    members = jax.lax.dynamic_slice(values, (start,), (_BLOCK,))
    if was_cleared:
        members = _mask(members, start + jnp.arange(_BLOCK, dtype=slot.dtype), ring)
    block_sums = jax.lax.dynamic_update_slice(ring.block_sums, _sum(members)[None], (block,))
    return ring._replace(block_sums=block_sums)


def mean(ring: Ring, *, was_cleared: bool = False) -> jax.Array:
    """Returns the mean of the values, 0 if there are none; ``was_cleared`` as in :func:`insert`."""
    size = ring.values.size
    whole = size // _BLOCK * _BLOCK
    parts = jnp.concatenate([ring.block_sums[: whole // _BLOCK], ring.values[whole:]])
    if was_cleared:
        starts = np.array([*range(0, whole, _BLOCK), *range(whole, size)], np.uint32)
        parts = _mask(parts, starts, ring)
    return _sum(parts) / jnp.maximum(_length(ring), 1).astype(parts.dtype)


def _length(ring: Ring) -> jax.Array:
    """The number of values."""
    return jnp.minimum(ring.position, ring.values.size).astype(jnp.uint32)


def _mask(numbers: jax.Array, slots: ArrayLike, ring: Ring) -> jax.Array:
    """Replaces numbers at slots that hold no value since the last :func:`clear` by zeros."""
    return _numerics.where(slots < _length(ring), numbers, 0)


def _sum(numbers: jax.Array) -> jax.Array:
    """The sum of a vector, added pairwise if it is short.

    On a CPU each addition of ``jnp.sum`` waits for the previous one.
    """
    if numbers.size > 3 * _BLOCK:  # unrolling would make a long program
        return jnp.sum(numbers)
    terms = [*numbers]
    while len(terms) > 1:
        pairs = list(itertools.zip_longest(terms[::2], terms[1::2]))
        terms = [left if right is None else left + right for left, right in pairs]
    return terms[0]
