"""The ring buffer against a Python list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedylr_jax import _ring

SIZES = [1, 2, 7, 8, 9, 16, 21, 24, 50]  # without a block, of whole blocks, with values after the last block
LENGTH = 60


@functools.partial(jax.jit, static_argnames="size")
def run(values, is_valid, clears, *, size):
    """The buffer and its mean after each value; where ``clears`` is True it is cleared first."""

    def body(ring, inputs):
        value, valid, clear = inputs
        cleared = _ring.clear(ring)
        ring = jax.tree.map(functools.partial(jnp.where, clear), cleared, ring)
        ring = _ring.insert(ring, value, valid)
        return ring, (ring, _ring.mean(ring, was_cleared=True))

    return jax.lax.scan(body, _ring.empty(size, jnp.float32), (values, is_valid, clears))[1]


# Multiples of 1/64: sums are exact in any order.
numbers = st.integers(-4096, 4096).map(lambda n: n / 64)
steps = st.tuples(numbers, st.integers(0, 9).map(bool), st.integers(0, 39).map(lambda n: n == 0))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), st.lists(steps, min_size=LENGTH, max_size=LENGTH))
def test_the_mean_is_that_of_the_last_valid_values_since_the_last_clear(size, steps):
    values, is_valid, clears = map(np.array, zip(*steps, strict=True))
    rings, means = run(np.where(is_valid, values, np.nan).astype(np.float32), is_valid, clears, size=size)
    held = []
    for index, (value, valid, clear) in enumerate(steps):
        held = [] if clear else held
        held = [*held, value][-size:] if valid else held
        expected = np.float32(sum(held)) / np.float32(len(held)) if held else 0
        assert means[index] == np.float32(expected)
        assert min(rings.position[index], size) == len(held)


@pytest.mark.parametrize("size", [3, 8, 21])
def test_the_position_stays_below_twice_the_size_and_the_values_are_the_last_ones(size):
    values = np.arange(10 * size, dtype=np.float32)
    always = np.ones(values.shape, bool)
    rings, _ = run(values, always, ~always, size=size)
    assert rings.position.max() == 2 * size - 1
    np.testing.assert_array_equal(np.sort(rings.values[-1]), values[-size:])


def test_rounding_errors_do_not_accumulate():
    """A running sum of these values ends with an error of the largest ones; here nothing of them is left."""
    values = np.concatenate([np.full(50, 1e8), np.full(50, 0.125)]).astype(np.float32)
    always = np.ones(values.shape, bool)
    assert run(values, always, ~always, size=50)[1][-1] == 0.125
