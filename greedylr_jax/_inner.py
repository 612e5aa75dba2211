"""Wrapped optimizers: ``inner`` is built with learning rate 1, and its updates point downhill.

Rules that own their learning rate multiply the updates of ``inner`` by it, as ``optax.contrib.mechanize``
does. A bare direction such as ``optax.scale_by_adam()`` points uphill, and a rule around it would maximize
the loss; :func:`check_descends` detects this when the optimizer state is made.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedylr_jax import _checks, _forwarding

_MAX_STEPS = 10_000  # then a leaf that has not moved counts as frozen
_MAX_SIZE = 2**16  # elements in total up to which the check may use the parameters' own shapes
_CLEAR = -0.5  # cosine of gradient and update that needs no second look
_TOLERANCE = 1e-6  # of a cosine, for rounding


def check_descends(name: str, inner: optax.GradientTransformation, params: optax.Params) -> None:
    """Raises an error if an update of ``inner`` points along the gradient.

    Runs ``inner`` on the quadratic |p|^2 / 2 until each leaf has moved, and compares gradient and update leaf
    by leaf. Where they do not clearly point apart, the same step is taken with the opposite gradient and the
    sign of <g, u(g) - u(-g)> decides, in which contributions that do not depend on the gradient (weight
    decay, noise) cancel. The parameters are stand-ins with the same tree, dtypes and numbers of dimensions
    and at most two elements a dimension, so that the check needs neither the values of ``params`` nor their
    memory, and works under ``jax.jit``, ``jax.vmap`` and ``jax.eval_shape``. It takes about a tenth of the
    time that compiling the update takes.

    The check passes where the sign cannot be known: if hyperparameters inside ``inner`` are traced; for
    leaves that never move; and, with a ``UserWarning``, if the update fails on the stand-ins.

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
            with _eager_on_host():
                uphill = _uphill_leaf(_forwarding.accept_extra_args(inner), stand_in)
        except Exception as error:  # of any type: it comes from the code of inner
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


def has_momentum(inner: optax.GradientTransformation, params: optax.Params) -> bool:
    """Whether the updates of ``inner`` average over gradients: SGD and AdaGrad do not, momentum and Adam do.

    A gradient is followed by gradients of zero. The updates of these depend on the sign of the first gradient
    if it is part of an average, and not if only its square was accumulated. Gradients that ``inner``
    accumulates over several steps are one gradient. Computed as :func:`check_descends` is; True where
    that is not possible.
    """
    if not jax.tree.leaves(params):
        return True
    for stand_in in _stand_ins(params):
        with contextlib.suppress(Exception), _eager_on_host():  # of any type: it comes from the code of inner
            accepting = _forwarding.accept_extra_args(inner)
            after = [
                jax.tree.leaves(_update_after(accepting, _quadratic(stand_in, center)))
                for center in (0.0, 2.0)  # opposite gradients
            ]
            if any(map(_checks.is_traced, after[0])):
                return True
            return any(np.any(left != right) for left, right in zip(*after, strict=True))
    return True


@contextlib.contextmanager
def _eager_on_host() -> Iterator[None]:
    """Evaluates at once, also while tracing; on the CPU, where operations on few elements are fastest."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.ensure_compile_time_eval())
        stack.enter_context(jax.transfer_guard("allow"))
        stack.enter_context(jax.debug_nans(False))
        with contextlib.suppress(RuntimeError):  # JAX may be configured to have no CPU backend
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _stand_ins(params: optax.Params) -> Iterator[optax.Params]:
    """Parameters of order 1 with at most two elements a dimension; then with the real shapes, if small."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    yield _filled(params, 2)
    longest = max(max(shape, default=0) for shape in shapes)
    if longest > 2 and sum(map(np.prod, shapes)) <= _MAX_SIZE:
        yield _filled(params, longest)


def _filled(params: optax.Params, longest: int) -> optax.Params:
    """Positive numbers of order 1 that differ along each dimension; zeros in integer leaves."""

    def fill(leaf: Any) -> np.ndarray:
        dtype = jnp.result_type(leaf)
        shape = tuple(min(length, longest) for length in jnp.shape(leaf))
        numbers = 1 + 0.5 * np.sin(1.0 + np.arange(np.prod(shape, dtype=int))).reshape(shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (numbers * (1 + 0.5j)).astype(dtype)
        return (numbers if jnp.issubdtype(dtype, jnp.floating) else np.zeros(shape)).astype(dtype)

    return jax.tree.map(fill, params)


class _Quadratic(NamedTuple):
    """A step from ``params`` on |p - center|^2 / 2."""

    params: optax.Params
    gradient: optax.Updates
    value: np.ndarray
    value_fn: Callable[[optax.Params], jax.Array]

    def update(self, inner: optax.GradientTransformationExtraArgs, state: optax.OptState) -> tuple[Any, Any]:
        extra_args = {"value": self.value, "grad": self.gradient, "value_fn": self.value_fn}
        return inner.update(self.gradient, state, self.params, **extra_args)


def _quadratic(params: optax.Params, center: float) -> _Quadratic:
    """The quadratic around ``center * params``; 0 and 2 give opposite gradients and the same value."""
    centers = jax.tree.map(lambda leaf: np.asarray(center * leaf, leaf.dtype), params)
    gradient = jax.tree.map(lambda leaf, middle: np.asarray(leaf - middle, leaf.dtype), params, centers)

    def value_fn(point: optax.Params) -> jax.Array:
        def square(leaf: jax.Array, middle: np.ndarray) -> jax.Array:
            if not jnp.issubdtype(middle.dtype, jnp.inexact):
                return jnp.zeros(())
            return jnp.sum(jnp.square(jnp.abs(leaf - middle))).astype(jnp.float32)

        return sum(jax.tree.leaves(jax.tree.map(square, point, centers)), start=jnp.zeros(())) / 2

    norms = [np.linalg.norm(leaf.astype(np.complex64)) for leaf in jax.tree.leaves(gradient)]
    return _Quadratic(params, gradient, np.asarray(np.square(norms).sum() / 2, np.float32), value_fn)


def _update_after(inner: optax.GradientTransformationExtraArgs, problem: _Quadratic) -> optax.Updates:
    """The next update of ``inner`` with gradients of zero, after its first update with a gradient."""
    still = problem._replace(gradient=jax.tree.map(np.zeros_like, problem.gradient))
    first_state = inner.init(problem.params)
    updates, state = problem.update(inner, first_state)
    if any(map(_checks.is_traced, jax.tree.leaves(updates))):
        return updates
    if any(map(np.any, jax.tree.leaves(updates))):
        return still.update(inner, state)[0]
    # Accumulates over several steps, or has a warm-up from 0.
    everywhere, zeros = np.ones(len(jax.tree.leaves(updates)), bool), jax.tree.map(np.zeros_like, updates)
    _, (_, _, state) = _compiled_steps(inner, problem)(everywhere, (first_state, zeros, state))
    _, (_, updates, _) = _compiled_steps(inner, still)(everywhere, (state, zeros, state))
    return updates


def _uphill_leaf(inner: optax.GradientTransformationExtraArgs, params: optax.Params) -> str | None:
    """The path of a leaf whose update points along its gradient; None if none is known."""
    problem = _quadratic(params, 0.0)
    leaves = jax.tree_util.tree_leaves_with_path(problem.gradient)
    waiting = {index for index, (_, leaf) in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    next_move = None
    state = inner.init(params)
    updates, next_state = problem.update(inner, state)
    while True:
        if any(map(_checks.is_traced, jax.tree.leaves(updates))):
            return None
        moved = {index for index in waiting if np.any(jax.tree.leaves(updates)[index])}
        index = _first_along_gradient(inner, problem, state, updates, moved)
        if index is not None:
            return jax.tree_util.keystr(leaves[index][0])
        waiting -= moved
        if waiting and next_move is None:
            waiting &= _reached_by_gradients(inner, problem, next_state)
            next_move = _compiled_steps(inner, problem)
        if not waiting or next_move is None:
            return None
        mask = np.isin(np.arange(len(leaves)), list(waiting))
        step, (state, updates, next_state) = next_move(mask, (state, updates, next_state))
        if step >= _MAX_STEPS:
            return None


def _first_along_gradient(
    inner: optax.GradientTransformationExtraArgs,
    problem: _Quadratic,
    state: optax.OptState,
    updates: optax.Updates,
    indices: set[int],
) -> int | None:
    """The first of these leaves whose update points along the gradient."""
    gradients, steps = jax.tree.leaves(problem.gradient), jax.tree.leaves(updates)
    unclear = [index for index in sorted(indices) if not _cosine(gradients[index], steps[index]) < _CLEAR]
    if not unclear:
        return None
    opposite, _ = _quadratic(problem.params, 2.0).update(inner, state)
    for index in unclear:
        step, reverse = (
            np.asarray(tree[index], np.complex128) for tree in (steps, jax.tree.leaves(opposite))
        )
        # A momentum of many steps, of which only the sign is taken, is the same for both.
        change = step - reverse if np.any(step != reverse) else step
        if _cosine(gradients[index], change) > _TOLERANCE:
            return index
    return None


def _cosine(left: Any, right: Any) -> float:
    left, right = np.asarray(left, np.complex128), np.asarray(right, np.complex128)
    return float(np.vdot(left, right).real / (np.linalg.norm(left) * np.linalg.norm(right)))


def _reached_by_gradients(
    inner: optax.GradientTransformationExtraArgs, problem: _Quadratic, state: optax.OptState
) -> set[int]:
    """The leaves whose updates depend on gradients, of this or earlier steps; others are frozen."""

    def step(gradient: optax.Updates, state: optax.OptState) -> tuple[Any, Any]:
        return problem._replace(gradient=gradient).update(inner, state)

    jaxpr = jax.make_jaxpr(step)(problem.gradient, state).jaxpr
    count = len(jax.tree.leaves(problem.gradient))
    inputs = set(range(count))
    while True:
        reached = {id(jaxpr.invars[index]) for index in inputs}
        for equation in jaxpr.eqns:
            if any(id(variable) in reached for variable in equation.invars):
                reached.update(map(id, equation.outvars))
        outputs = {index for index, variable in enumerate(jaxpr.outvars) if id(variable) in reached}
        grown = inputs | {index for index in outputs if index >= count}  # the state's leaves follow
        if grown == inputs:
            return {index for index in outputs if index < count}
        inputs = grown


def _compiled_steps(inner: optax.GradientTransformationExtraArgs, problem: _Quadratic) -> Callable[..., Any]:
    """A function that takes steps until the update of a leaf in ``mask`` is not zero."""

    def run(mask: jax.Array, first: tuple[Any, Any, Any]) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        def is_waiting(carry: Any) -> jax.Array:
            step, (_, updates, _) = carry
            moves = jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates)])
            return (step < _MAX_STEPS) & ~jnp.any(moves & mask)

        def advance(carry: Any) -> Any:
            step, (_, _, state) = carry
            return step + 1, (state, *problem.update(inner, state))

        return jax.lax.while_loop(is_waiting, advance, (0, first))

    return jax.jit(run)
