"""Dtypes, selects and products that all rules share.

Which ``where`` to use:

* :func:`where` and :func:`select` (``jax.lax.select``) for the scalars and small arrays of a rule's state, in
  code that runs at every step. Each ``jnp.where`` is a function of its own in the program; the dozen of
  them in a rule were 25 to 33% of the time to trace and lower it.
* ``jnp.where`` where operands must be broadcast or promoted, for arrays of the parameters' size, and in code
  that runs outside of the training step.

Both evaluate both branches, so neither guards a division: replace the divisor instead.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks

T = TypeVar("T")
R = TypeVar("R")


def default_float_dtype() -> jnp.dtype:
    """The dtype of rates and averages: float32, or float64 when JAX runs with 64 bits."""
    return jnp.result_type(float)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf holds floating-point or complex numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def computed_once(tree: T) -> T:
    """The same arrays, behind ``jax.lax.optimization_barrier`` except on GPUs.

    Without a barrier, XLA may compute arrays that have several readers anew for each of them, on a CPU with
    JAX 0.12 even the whole update of Adam. On a GPU it computes them in one kernel with a norm that reads
    them, which a barrier would separate. Under ``jax.shard_map`` leaves that vary along other axes have a
    barrier of their own, because its results vary along all axes along which any of its operands varies.
    """
    leaves, structure = jax.tree.flatten(tree)
    by_axes: dict[frozenset, dict[int, Any]] = {}
    for index, leaf in enumerate(leaves):
        if is_inexact(leaf):
            by_axes.setdefault(varying_axes(leaf), {})[index] = leaf

    def behind_barriers(groups: list[dict[int, Any]]) -> list[dict[int, Any]]:
        return [jax.lax.optimization_barrier(group) for group in groups]

    groups = jax.lax.platform_dependent(
        list(by_axes.values()), cuda=lambda same: same, rocm=lambda same: same, default=behind_barriers
    )
    computed = {index: leaf for group in groups for index, leaf in group.items()}
    return structure.unflatten([computed.get(index, leaf) for index, leaf in enumerate(leaves)])


def varying_axes(array: ArrayLike) -> frozenset:
    """The axes of ``jax.shard_map`` along which an array varies by its type.

    The attribute's name changed in JAX 0.10. Empty with ``check_vma=False``.
    """
    array_type = jax.typeof(array)
    manual = getattr(array_type, "manual_axis_type", None)
    return getattr(array_type, "vma", frozenset()) if manual is None else manual.varying


def where(condition: ArrayLike, on_true: ArrayLike, on_false: ArrayLike) -> jax.Array:
    """``jnp.where`` for two arrays of one shape, or an array and a number, which gets its shape and dtype.

    Args:
      condition: boolean, a scalar or of the arrays' shape.
      on_true: array, or number.
      on_false: array, or number.
    """
    shape, dtype = jnp.shape(on_true) or jnp.shape(on_false), jnp.result_type(on_true, on_false)

    def array(value: ArrayLike) -> ArrayLike:
        return value.astype(dtype) if isinstance(value, jax.Array) else np.full(shape, value, dtype)

    return jax.lax.select(condition, array(on_true), array(on_false))


def overwrite(previous: jax.Array, new: jax.Array) -> jax.Array:
    """``new``, for a field of a state that is written at every step and never read.

    ``jax.jit`` drops arguments that are not read, and pairs the other donated arguments with results by
    their order: if one is missing, XLA copies each later field that a step does not change. The compiled
    program has no such select.
    """
    return jax.lax.select(np.False_, previous, new)


def at_precision(function: Callable[..., R], matmul_precision: str | None) -> Callable[..., R]:
    """The function, with matrix products (and those of its derivatives) at a precision; None: as they are."""
    if matmul_precision is None:
        return function

    @functools.wraps(function)
    def at_that_precision(*args: Any) -> R:
        with jax.default_matmul_precision(matmul_precision):
            return function(*args)

    return at_that_precision


def fresh(array: jax.Array) -> jax.Array:
    """A copy of an array of a state, which stays valid if the state is donated; a tracer as it is."""
    return array if _checks.is_traced(array) else jnp.array(array)


def weakly_typed(scalar: jax.Array) -> jax.Array:
    """A new array with the same number in JAX's weak type: a product with it has the other factor's dtype.

    Optax's schedules return such arrays, and ``optax.inject_hyperparams`` converts them to the parameters'
    dtype, so that updates keep it.
    """
    weak = jnp.asarray(0.0)
    return weak.at[...].set(scalar) if weak.dtype == scalar.dtype else fresh(scalar)


def select(condition: ArrayLike, on_true: T, on_false: T) -> T:
    """:func:`where` for two states of the same structure."""
    return jax.tree.map(functools.partial(where, condition), on_true, on_false)


def scale_updates(updates: optax.Updates, scale: jax.Array) -> optax.Updates:
    """Multiplies every floating-point or complex leaf by ``scale``, keeping its dtype."""
    return jax.tree.map(lambda update: scale_leaf(update, scale), updates)


def scale_leaf(update: Any, scale: jax.Array) -> Any:
    """Multiplies one leaf by a scalar or by an array of its shape, keeping its dtype."""
    if not hasattr(update, "dtype"):
        update = jnp.asarray(update)
    dtype = update.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(scale_leaf(update.real, scale), scale_leaf(update.imag, scale))
    if not jnp.issubdtype(dtype, jnp.floating):
        return update
    # A product in bfloat16 would round the scale first, an error of up to 0.4% of the rate.
    wide = max(dtype, scale.dtype, key=lambda candidate: jnp.finfo(candidate).bits)
    return (update.astype(wide) * scale.astype(wide)).astype(dtype)


def like(tree: T, reference: T) -> T:
    """Converts the leaves to the dtypes of another tree of arrays; complex to real by the real part."""

    def convert(leaf: Any, other: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        is_complex = jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(other)
        return (leaf.real if is_complex else leaf).astype(other.dtype)

    return jax.tree.map(convert, tree, reference)
