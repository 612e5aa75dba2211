"""Wrapped optimizers: ``inner`` is built with learning rate 1, and its updates point downhill.

Rules that own their learning rate multiply the updates of ``inner`` by it, as ``optax.contrib.mechanize``
does. A bare direction such as ``optax.scale_by_adam()`` points uphill, and a rule around it would maximize
the loss; :func:`check_descends` detects this when the optimizer state is made.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedylr_jax import _checks

_EAGER_STEPS = 4  # covers a warm-up from 0 and small MultiSteps without compiling a loop
_MAX_STEPS = 10_000  # then a leaf that has not moved counts as frozen
_MAX_SIZE = 2**16  # elements in total up to which the check may use the parameters' own shapes
_TOLERANCE = 1e-6  # of the cosine


def check_descends(name: str, inner: optax.GradientTransformation, params: optax.Params) -> None:
    """Raises an error if an update of ``inner`` points along the gradient.

    Runs ``inner`` on a quadratic and on its mirror image, in which all gradients have the opposite sign,
    and takes the sign of <g, u(g) - u(-g)> for each leaf: contributions that do not depend on the gradient,
    such as weight decay and noise, cancel. The parameters are stand-ins with the same tree, dtypes and
    numbers of dimensions, each dimension at most 2, so that the check needs neither the values of
    ``params`` nor their memory, and works under ``jax.jit``, ``jax.vmap`` and ``jax.eval_shape``.

    The check passes if the sign cannot be known: hyperparameters inside ``inner`` are traced, an update
    stays zero (frozen parameters), or the update fails on the stand-ins, with a ``UserWarning``.

    Args:
      name: of the rule, for the error message.
      inner: the wrapped optimizer.
      params: the parameters that ``init`` of the rule is called with.

    Raises:
      ValueError: if the update of a leaf points along its gradient.
    """
    if not jax.tree.leaves(params):
        return
    failure = None
    for stand_in in _stand_ins(params):
        try:
            with jax.ensure_compile_time_eval():
                uphill = _uphill_leaf(optax.with_extra_args_support(inner), stand_in)
        except Exception as error:  # of any type: it comes from code that is not ours
            failure = error
            continue
        if uphill is None:
            return
        raise ValueError(
            f"{name}: inner must be an optimizer whose updates point downhill, built with learning rate 1, "
            f"such as optax.adam(1.0); the update{uphill and f' of {uphill}'} points along the gradient. "
            "If you passed a direction such as optax.scale_by_adam(), pass optax.adam(1.0), or chain it "
            "with optax.scale(-1.0)."
        )
    # Unknown: an inner that needs the real shapes of large parameters, a mapped axis, or extra arguments that
    # only the training has. If the failure is a defect of inner, the training meets it as well.
    warnings.warn(
        f"{name}: inner could not be checked, as its update failed on small parameters "
        f"({type(failure).__name__}: {failure}). It must be an optimizer whose updates point downhill, built "
        "with learning rate 1, such as optax.adam(1.0).",
        stacklevel=3,
    )


def _stand_ins(params: optax.Params) -> Iterator[optax.Params]:
    """Parameters of order 1 with at most two elements a dimension; then with the real shapes, if small."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    yield _filled(params, 2)
    longest = max(max(shape, default=0) for shape in shapes)
    if longest > 2 and sum(map(np.prod, shapes)) <= _MAX_SIZE:
        yield _filled(params, longest)


def _filled(params: optax.Params, longest: int) -> optax.Params:
    """Positive numbers, none the same, of which no row or column is constant; zeros in integer leaves."""

    def fill(leaf: Any) -> np.ndarray:
        dtype = jnp.result_type(leaf)
        shape = tuple(min(length, longest) for length in jnp.shape(leaf))
        numbers = 1 + 0.5 * np.sin(1.0 + np.arange(np.prod(shape, dtype=int))).reshape(shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (numbers * (1 + 0.5j)).astype(dtype)
        return (numbers if jnp.issubdtype(dtype, jnp.floating) else np.zeros(shape)).astype(dtype)

    return jax.tree.map(fill, params)


class _Quadratic(NamedTuple):
    """A step on |p - center|^2 / 2 from ``params``."""

    params: optax.Params
    gradient: optax.Updates
    value: jax.Array
    value_fn: Callable[[optax.Params], jax.Array]

    def update(self, inner: optax.GradientTransformationExtraArgs, state: optax.OptState) -> tuple[Any, Any]:
        extra_args = {"value": self.value, "grad": self.gradient, "value_fn": self.value_fn}
        return inner.update(self.gradient, state, self.params, **extra_args)


def _quadratic(params: optax.Params, center: float) -> _Quadratic:
    """The quadratic around ``center * params``: 0, or 2 for its mirror image."""
    centers = jax.tree.map(lambda leaf: np.asarray(center * leaf, leaf.dtype), params)
    gradient = jax.tree.map(lambda leaf, middle: np.asarray(leaf - middle, leaf.dtype), params, centers)

    def value_fn(point: optax.Params) -> jax.Array:
        def square(leaf: jax.Array, middle: np.ndarray) -> jax.Array:
            if not jnp.issubdtype(middle.dtype, jnp.inexact):
                return jnp.zeros(())
            return jnp.sum(jnp.square(jnp.abs(leaf - middle))).astype(jnp.float32)

        return sum(jax.tree.leaves(jax.tree.map(square, point, centers)), start=jnp.zeros(())) / 2

    return _Quadratic(params, gradient, value_fn(params), value_fn)


def _uphill_leaf(inner: optax.GradientTransformationExtraArgs, params: optax.Params) -> str | None:
    """The path of a leaf whose update points along its gradient; None if no such leaf is known."""
    problem, mirrored = _quadratic(params, 0.0), _quadratic(params, 2.0)
    leaves = jax.tree_util.tree_leaves_with_path(problem.gradient)
    state = inner.init(params)
    pending = [jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in leaves]
    for step in range(_EAGER_STEPS + 1):
        if step == _EAGER_STEPS:
            state = _before_next_move(inner, problem, state, pending)
        updates, next_state = problem.update(inner, state)
        opposite, _ = mirrored.update(inner, state)
        if any(map(_checks.is_traced, jax.tree.leaves((updates, opposite)))):
            return None
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(opposite), strict=True)
        for index, (update, reverse) in enumerate(pairs):
            path, gradient = leaves[index]
            if not pending[index] or not np.any(update):
                continue
            if _points_along(gradient, np.asarray(update), np.asarray(reverse)):
                return jax.tree_util.keystr(path)
            pending[index] = False
        if not any(pending):
            return None
        state = next_state
    return None


def _points_along(gradient: np.ndarray, update: np.ndarray, opposite: np.ndarray) -> bool:
    gradient, update, opposite = (array.astype(np.complex128) for array in (gradient, update, opposite))
    change = update - opposite
    change = change if np.any(change) else update  # the sign of a long momentum is the same for both
    product = np.vdot(gradient, change).real
    return bool(product > _TOLERANCE * np.linalg.norm(gradient) * np.linalg.norm(change))


def _before_next_move(
    inner: optax.GradientTransformationExtraArgs, problem: _Quadratic, state: optax.OptState, pending: list
) -> optax.OptState:
    """The state from which the next update of a pending leaf is not zero, after ``_MAX_STEPS`` at most."""

    def advance(carry: Any) -> Any:
        step, state, _ = carry
        updates, next_state = problem.update(inner, state)
        waiting = zip(jax.tree.leaves(updates), pending, strict=True)
        moves = jnp.stack([jnp.any(leaf != 0) for leaf, is_pending in waiting if is_pending]).any()
        state = jax.tree.map(lambda old, new: jnp.where(moves, old, new), state, next_state)
        return step + 1, state, moves

    def is_waiting(carry: Any) -> jax.Array:
        step, _, moves = carry
        return (step < _MAX_STEPS) & ~moves

    def run(state: optax.OptState) -> optax.OptState:
        return jax.lax.while_loop(is_waiting, advance, (0, state, jnp.asarray(False)))[1]

    return jax.jit(run)(state)
