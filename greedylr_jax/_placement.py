"""Checks that a learning-rate rule stands where it controls the step size."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax import contrib

from greedylr_jax import _forwarding, _numerics, _reading, _rollback, _rule
from greedylr_jax._misplaced import MisplacedRuleWarning
from greedylr_jax.probing import LRTunerState

_MAX_PROBE_STEPS = 1024  # more than any sensible number of accumulated micro-batches
# Wrappers with iterates of their own, and the field with the state of the optimizer inside. Their updates
# move the parameters to a certain point, which a factor on the updates would miss: a rule must be inside.
_WITH_ITERATES = {
    contrib.ScheduleFreeState: "base_optimizer_state",
    contrib.MechanicState: "base_optimizer_state",
}
# Others whose updates move the parameters to a certain point, such as a snapshot that is restored.
_OTHERS = (
    optax.LookaheadState,
    contrib.SAMState,
    contrib.COCOBState,
    contrib.MadgradState,
    _rollback.RollbackState,
    LRTunerState,
)

ADVICE = (
    "Put it after the optimizer, as in optax.chain(optax.adamw(1e-3), greedy_lr()); or use "
    "greedylr_jax.chain, in which it may stand anywhere; or make it the learning rate, as in "
    "optax.inject_hyperparams(optax.adamw)(learning_rate=greedy_lr_schedule(...))."
)
ADVICE_INSIDE = (
    "Put the rule inside, as in optax.contrib.schedule_free(optax.chain(optax.sgd(rate), greedy_lr()), "
    "rate). optax.lookahead and optax.contrib.sam pass no loss on, so no rule can be used with them."
)


def find_wrapper(opt_state: optax.OptState) -> str | None:
    """The name of a state in ``opt_state`` whose optimizer's updates a rule must not scale, or None.

    These optimizers move the parameters to a certain point: an iterate of their own
    (``optax.contrib.schedule_free``, ``optax.lookahead``) or a snapshot that they restore.
    """
    for found in _reading.find(opt_state, _moves_to_a_point):
        return type(found.state).__name__
    return None


def _moves_to_a_point(node: Any) -> bool:
    if isinstance(node, LRTunerState):
        return getattr(node, "snapshot", True) is not None
    return isinstance(node, (*_WITH_ITERATES, *_OTHERS))


def assert_controls_learning_rate(tx: optax.GradientTransformation, params: optax.Params) -> None:
    """Checks that every learning-rate rule in ``tx`` controls the step size.

    A rule before Adam multiplies the gradients, and Adam divides the factor out again: training runs, but the
    rule has no effect. This function runs a few updates with random gradients, halves the scale of a rule,
    and checks that the next update of the parameters under its control is halved, for each rule in turn. It
    compiles ``tx.update`` once; call it before training.

    A rule must be inside wrappers with iterates of their own (``optax.contrib.schedule_free``,
    ``optax.contrib.mechanize``) and wrappers that restore parameters (:func:`greedylr_jax.with_rollback`),
    since their updates must not be scaled.

    Args:
      tx: a gradient transformation that contains at least one learning-rate rule.
      params: parameters with the structure, shapes and dtypes that will be trained; not changed.

    Returns:
      None.

    Raises:
      AssertionError: if ``tx`` has no rule, or a rule does not control the step size; the message says
        where the rule is and where to move it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import assert_controls_learning_rate, greedy_lr
      >>> params = jnp.ones(3)
      >>> assert_controls_learning_rate(optax.chain(optax.adamw(1e-3), greedy_lr()), params)
      >>> assert_controls_learning_rate(optax.chain(greedy_lr(), optax.adamw(1e-3)), params)
      Traceback (most recent call last):
      ...
      AssertionError: the learning-rate rule at opt_state[0] does not control the step size: ...
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MisplacedRuleWarning)
        _check_all_rules(tx, params)


def _check_all_rules(tx: optax.GradientTransformation, params: optax.Params) -> None:
    step, state = _probe_step(tx), tx.init(params)
    found = _reading.find(state)
    if not found:
        raise AssertionError(
            "this transformation holds no learning-rate rule. Add one, as in "
            "greedylr_jax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr())."
        )
    for rule in found:
        _assert_not_after_wrapper(rule, state)
    direct = [index for index, rule in enumerate(found) if not _wrapper_around(rule, state)]
    if direct:
        # The moments must be filled: in the first step even a rule that scales the gradients of a momentum
        # method halves the update.
        for _ in range(2):
            _, state = _next_update(step, params, state, state)
        for index in direct:
            (before, after), _ = _next_update(step, params, state, _with_half_scale(state, index))
            _assert_halved(found[index], before, after)
    for index in set(range(len(found))) - set(direct):
        _assert_controls_wrapped(tx, params, found[index], index)


def _assert_not_after_wrapper(rule: _reading.Found, opt_state: optax.OptState) -> None:
    """Raises an error if the rule comes after a wrapper whose updates it must not scale."""
    for other in _reading.find(opt_state, _moves_to_a_point):
        shared = 0
        for mine, its in zip(rule.path, other.path, strict=False):
            if mine != its:
                break
            shared += 1
        if min(len(rule.path), len(other.path)) == shared:
            continue  # the rule is inside
        mine, its = rule.path[shared], other.path[shared]
        if isinstance(mine, jax.tree_util.SequenceKey) and mine.idx > its.idx:
            raise AssertionError(
                f"the learning-rate rule at {rule.written} does not control the step size: it scales the "
                f"updates of {other.written} ({type(other.state).__name__}), which must not be scaled. "
                f"{ADVICE_INSIDE}"
            )


def _wrapper_around(rule: _reading.Found, opt_state: optax.OptState) -> bool:
    """Whether a rule is inside a wrapper with iterates of its own."""
    wrappers = _reading.find(opt_state, lambda node: isinstance(node, tuple(_WITH_ITERATES)))
    return any(rule.path[: len(wrapper.path)] == wrapper.path for wrapper in wrappers)


def _assert_controls_wrapped(
    tx: optax.GradientTransformation, params: optax.Params, rule: _reading.Found, index: int
) -> None:
    """Halves the scale where the update is linear in it: at fresh iterates, with filled moments."""
    # Parameters that are zero, in float32 or wider, lose no small step to rounding.
    origin = jax.tree.map(_wide_zeros, params)
    step, initial = _probe_step(tx), tx.init(origin)
    filled = initial
    for _ in range(2):
        _, filled = _next_update(step, origin, filled, filled)
    fresh = _with_fresh_iterates(filled, initial)
    (before, after), _ = _next_update(step, origin, fresh, _with_half_scale(fresh, index))
    _assert_halved(rule, before, after)


def _with_fresh_iterates(filled: optax.OptState, initial: optax.OptState) -> optax.OptState:
    """The state ``filled`` whose wrappers are as in ``initial``, except for the optimizers inside them."""

    def refresh(filled: Any, initial: Any) -> Any:
        field = _WITH_ITERATES.get(type(filled))
        if field is None:
            return filled
        inner = _with_fresh_iterates(getattr(filled, field), getattr(initial, field))
        return initial._replace(**{field: inner})

    return jax.tree.map(
        refresh, filled, initial, is_leaf=lambda node: isinstance(node, tuple(_WITH_ITERATES))
    )


def _wide_zeros(leaf: ArrayLike) -> jax.Array:
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.promote_types(dtype, jnp.float32)
    return jnp.zeros(jnp.shape(leaf), dtype)


def _probe_step(tx: optax.GradientTransformation) -> Any:
    value = np.ones((), _numerics.default_float_dtype())
    update = _forwarding.bind_extra_args(
        tx, value=value, has_value=False, value_fn=lambda params: value
    ).update

    def step(params: optax.Params, state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
        return update(_random_like(params), state, params)

    return jax.jit(step)


def _random_like(params: optax.Params) -> optax.Updates:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def gradient(key: jax.Array, leaf: ArrayLike) -> jax.Array:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.zeros(shape, dtype)
        return jax.random.normal(key, shape, dtype)

    return structure.unflatten(map(gradient, keys, leaves))


def _next_update(
    step: Any, params: optax.Params, left: optax.OptState, right: optax.OptState
) -> tuple[tuple[optax.Updates, optax.Updates], optax.OptState]:
    """Runs two states up to the next update that is not zero (accumulation gives zeros in between)."""
    for _ in range(_MAX_PROBE_STEPS):
        before, left = step(params, left)
        after, right = step(params, right)
        if any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(before)):
            return (before, after), left
    raise AssertionError(
        f"this transformation gave zero updates for {_MAX_PROBE_STEPS} steps with random gradients, so "
        "nothing controls its step size."
    )


def _with_half_scale(opt_state: optax.OptState, index: int) -> optax.OptState:
    """The optimizer state with the scale of rule number ``index`` halved."""
    rules = iter(range(len(_reading.find(opt_state))))

    def halve(node: Any) -> Any:
        if not _reading.is_rule(node) or next(rules) != index:
            return node
        return _rule.map_rates(lambda scale: scale / 2, node)

    return jax.tree.map(halve, opt_state, is_leaf=_reading.is_rule)


def _assert_halved(rule: _reading.Found, before: optax.Updates, after: optax.Updates) -> None:
    """Raises an error unless every leaf is halved, or not under the control of this rule."""
    ratios, halved = [], False
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(left.dtype, jnp.inexact) or not np.any(np.asarray(left) != 0):
            continue
        # Halving is exact except for the rounding in what follows the rule.
        tolerance = 8 * float(jnp.finfo(left.dtype).eps)
        wide = complex if jnp.issubdtype(left.dtype, jnp.complexfloating) else float
        full, scaled = np.asarray(left).astype(wide), np.asarray(right).astype(wide)
        if np.allclose(scaled, full / 2, rtol=tolerance, atol=0):
            halved = True
        elif not np.array_equal(scaled, full):
            ratios.append(float(np.linalg.norm(scaled) / np.linalg.norm(full)))
    if halved and not ratios:
        return
    effect = f"changed the update by a factor of {ratios[0]:.3g}" if ratios else "did not change the update"
    raise AssertionError(
        f"the learning-rate rule at {rule.written} does not control the step size: halving its scale "
        f"{effect} (expected: a factor of 0.5). In this position it scales the gradients, which is undone by "
        f"the transformations after it (Adam's normalisation, momentum, clipping). {ADVICE}"
    )
