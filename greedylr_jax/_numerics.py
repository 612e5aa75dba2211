"""Dtypes, selects and products that every rule shares."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

T = TypeVar("T")


def default_float_dtype() -> jnp.dtype:
    """The dtype of rates and averages: float32, or float64 when JAX runs with 64 bits."""
    return jnp.result_type(float)


def where(condition: ArrayLike, on_true: ArrayLike, on_false: ArrayLike) -> jax.Array:
    """``jnp.where`` for two arrays of one shape, or an array and a number.

    Each ``jnp.where`` is a function of its own in the program. The dozen that a rule has were a quarter to a
    third of what it took to trace and lower.
    """
    shape, dtype = jnp.shape(on_true) or jnp.shape(on_false), jnp.result_type(on_true, on_false)

    def array(value: ArrayLike) -> ArrayLike:
        return value.astype(dtype) if isinstance(value, jax.Array) else np.full(shape, value, dtype)

    return jax.lax.select(condition, array(on_true), array(on_false))


def select(condition: ArrayLike, on_true: T, on_false: T) -> T:
    """:func:`where` for two states of the same structure."""
    return jax.tree.map(functools.partial(where, condition), on_true, on_false)


def scale_updates(updates: optax.Updates, scale: jax.Array) -> optax.Updates:
    """Multiplies every floating or complex leaf by ``scale``, and keeps every leaf's dtype."""
    return jax.tree.map(lambda update: scale_leaf(update, scale), updates)


def scale_leaf(update: Any, scale: jax.Array) -> Any:
    """Multiplies one leaf, by a scalar or by an array of its shape."""
    if not hasattr(update, "dtype"):
        update = jnp.asarray(update)
    dtype = update.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(scale_leaf(update.real, scale), scale_leaf(update.imag, scale))
    if not jnp.issubdtype(dtype, jnp.floating):
        return update
    # A narrow product would round the scale to bfloat16 first, which costs up to 0.4% of the rate.
    wide = max(dtype, scale.dtype, key=lambda candidate: jnp.finfo(candidate).bits)
    return (update.astype(wide) * scale.astype(wide)).astype(dtype)
