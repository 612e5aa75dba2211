"""Reading the learning rate out of an optimizer state, and checking that a rule controls it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _numerics, _observe, _rollback, _rule

_MAX_PROBE_STEPS = 1024  # more than any sensible number of accumulated micro-batches


class _Found(NamedTuple):
    """One rule, or one optimizer with rates of its own, in an optimizer state."""

    group: str  # the dictionary keys on the way to it, such as the labels of optax.partition
    path: str  # where it is, written as Python would
    state: _rule.RuleState | _rule.RuleScheduleState | _rule.RateState


def _is_rule(node: Any) -> bool:
    return isinstance(node, (_rule.RuleState, _rule.RuleScheduleState))


def _is_rate(node: Any) -> bool:
    return isinstance(node, _rule.RateState)


def _or_kept(wanted: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Where to stop looking: what is kept to go back to holds rules, too, but none that acts."""
    return lambda node: wanted(node) or isinstance(node, _rollback.Kept)


def _carried(state: _rule.RuleState | _rule.RuleScheduleState) -> _rule.RuleState:
    return state.rule_state if isinstance(state, _rule.RuleScheduleState) else state


def _find(opt_state: optax.OptState, wanted: Callable[[Any], bool]) -> list[_Found]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_or_kept(wanted))
    found = []
    for path, node in nodes:
        if wanted(node):
            keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            if isinstance(node, _rule.RuleScheduleState):
                keys = keys[:-1]  # inject_hyperparams files a schedule under its argument's name
            written = "opt_state" + jax.tree_util.keystr(path)
            found.append(_Found("/".join(keys), written, node))
    return found


def _groups_of_rates(found: list[_Found]) -> list[_Found]:
    """The same, with one entry for each label where an optimizer keeps a rate for each group."""
    split = []
    for rate in found:
        rates = rate.state.learning_rate
        if isinstance(rates, dict) and all(getattr(value, "shape", None) == () for value in rates.values()):
            for label, value in rates.items():
                name = "/".join(filter(None, (rate.group, label)))
                split.append(_Found(name, f"{rate.path}[{label!r}]", _rule.RateState(value)))
        else:
            split.append(rate)
    return split


def _only(found: list[_Found], group: str | None, kind: str) -> _Found:
    """The one that was found, or the one of a group."""
    if not found:
        raise ValueError(
            "this optimizer state holds no learning-rate rule. Add one, as in "
            "greedylr_jax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr())."
        )
    matching = found if group is None else [each for each in found if each.group == group]
    if len(matching) != 1:
        where = "; ".join(f"group {each.group!r} at {each.path}" for each in found)
        raise ValueError(
            f"group={group!r} names {len(matching)} {kind} of this optimizer state, and must name one. It "
            f"holds: {where}. Or use greedylr_jax.metrics, which reads all."
        )
    return matching[0]


def _scale(state: _rule.RuleState | _rule.RuleScheduleState) -> jax.Array:
    scale = jnp.asarray(_carried(state).rule.scale)
    if isinstance(state, _rule.RuleScheduleState):
        return scale / jnp.asarray(state.init_value)
    return scale


def get_scale(opt_state: optax.OptState, *, group: str | None = None) -> jax.Array:
    """The multiplier that the learning-rate rule of an optimizer state holds.

    It is the one that the last update used. For a rule that is a schedule it is the current rate over
    the initial one.

    Args:
      opt_state: any nesting of Optax states (chains, wrappers, ``inject_hyperparams``, partitions).
      group: which rule, where there are several: the labels on the way to it, as in
        ``optax.partition({"encoder": ..., "decoder": ...}, ...)``; None: the only one.

    Returns:
      A float scalar. Works under ``jax.jit``.

    Raises:
      ValueError: if there is no rule, or more than one that fits ``group``.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr(patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> print(greedylr_jax.get_scale(state))
      1.0526316
    """
    return _scale(_only(_find(opt_state, _is_rule), group, "learning-rate rules").state)


def get_learning_rate(
    opt_state: optax.OptState,
    base_learning_rate: ArrayLike | None = None,
    *,
    group: str | None = None,
) -> jax.Array:
    """The learning rate that the last update used.

    That is the base rate times the rule's scale; or the rate of an optimizer that keeps its own, such as
    :func:`greedylr_jax.hypergradient`, times the scale of a rule where there is one behind it.

    Args:
      opt_state: any nesting of Optax states.
      base_learning_rate: the optimizer's own rate, a scalar, which the rule multiplies. Not needed where
        the rule is a schedule, or where the optimizer's state holds the rate
        (``optax.inject_hyperparams``, :func:`greedylr_jax.hypergradient`).
      group: which rule, where there are several, as in :func:`get_scale`.

    Returns:
      A float scalar, or a pytree like the parameters where each element has a rate of its own. Works
      under ``jax.jit``.

    Raises:
      ValueError: if there is no rule, more than one that fits ``group``, or no base rate.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.sgd(0.5), greedylr_jax.greedy_lr(factor=0.5, patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> print(greedylr_jax.get_learning_rate(state, base_learning_rate=0.5))
      1.0
    """
    rules, rates = _find(opt_state, _is_rule), _groups_of_rates(_find(opt_state, _is_rate))
    if not rules and rates:
        return _only(rates, group, "learning rates").state.learning_rate
    state = _only(rules, group, "learning-rate rules").state
    if isinstance(state, _rule.RuleScheduleState):
        return jnp.asarray(state.rule_state.rule.scale)
    if base_learning_rate is None and rates:
        base_learning_rate = _only(rates, group, "learning rates").state.learning_rate
    elif base_learning_rate is None:
        base_learning_rate = _injected_rate(opt_state)
    if callable(base_learning_rate):
        raise ValueError(
            "base_learning_rate must be a number, got a schedule: pass schedule(step) for the step in "
            "question."
        )
    scale = _scale(state)
    return jax.tree.map(lambda rate: jnp.asarray(rate, scale.dtype) * scale, base_learning_rate)


def _injected_rate(opt_state: optax.OptState) -> jax.Array:
    rates = optax.tree.get_all_with_path(opt_state, "learning_rate")
    if len(rates) != 1:
        raise ValueError(
            "base_learning_rate is needed: this optimizer state holds only the rule's multiplier. Pass the "
            "rate that the optimizer was built with, or build it with optax.inject_hyperparams."
        )
    return rates[0][1]


def metrics(opt_state: optax.OptState, *, prefix: str = "") -> dict[str, jax.Array]:
    """Every scalar that the rules of an optimizer state hold, as a flat dict for loggers.

    Args:
      opt_state: any nesting of Optax states.
      prefix: put before every key, such as ``"train/"``.

    Returns:
      A dict from names to scalars: ``scale``; ``learning_rate`` where the rule is a schedule or the
      optimizer keeps its own (of many, ``learning_rate_min``, ``_mean`` and ``_max``); and the other
      scalar fields of the rule's state under their names. Where a rule stands under dictionary
      keys (``optax.partition``) these come first: ``"encoder/scale"``. Several rules under one name are
      told apart by a number: ``"1/scale"``. Works under ``jax.jit``.

    Raises:
      ValueError: if there is no rule.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr(patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> logged = greedylr_jax.metrics(state, prefix="lr/")
      >>> print(logged["lr/scale"], logged["lr/best_value"])
      1.0526316 1.0
    """
    found = _find(opt_state, _is_rule) + _groups_of_rates(_find(opt_state, _is_rate))
    if not found:
        _only(found, None, "learning-rate rules")  # raises
    groups = [(each.group, type(each.state)) for each in found]
    result = {}
    for position, each in enumerate(found):
        parts = [each.group] if each.group else []
        earlier = groups[:position].count(groups[position])
        if earlier:
            parts.append(str(earlier))
        for name, field in _scalars(each.state).items():
            result[prefix + "/".join([*parts, name])] = field
    return result


def _scalars(state: _rule.RuleState | _rule.RuleScheduleState | _rule.RateState) -> dict[str, jax.Array]:
    if isinstance(state, _rule.RateState):
        return _spread_of_rates(state.learning_rate)
    fields = {"scale": _scale(state)}
    if isinstance(state, _rule.RuleScheduleState):
        fields["learning_rate"] = jnp.asarray(state.rule_state.rule.scale)
    rule = _carried(state).rule
    for name, field in rule._asdict().items():
        if name not in fields and not isinstance(field, tuple) and jnp.shape(field) == ():
            fields[name] = jnp.asarray(field)
    return fields


def _spread_of_rates(rates: Any) -> dict[str, jax.Array]:
    """One rate as it is; of a pytree of rates the least, the mean and the greatest."""
    leaves = [jnp.ravel(jnp.asarray(leaf)) for leaf in jax.tree.leaves(rates)]
    if len(leaves) == 1 and jnp.shape(jax.tree.leaves(rates)[0]) == ():
        return {"learning_rate": leaves[0][0]}
    every = jnp.concatenate(leaves)
    if every.size == 0:  # one rate an element, of parameters without elements
        return {}
    return {
        "learning_rate_min": jnp.min(every),
        "learning_rate_mean": jnp.mean(every),
        "learning_rate_max": jnp.max(every),
    }


def assert_controls_learning_rate(tx: optax.GradientTransformation, params: optax.Params) -> None:
    """Checks that every learning-rate rule in ``tx`` reaches the step size.

    A rule that stands before Adam multiplies the gradients, which Adam divides out again: training
    runs, and the rule does nothing. This function runs a few updates with random gradients, halves the
    scale that a rule holds, and looks whether the next update of the parameters under its control
    halves, for each rule in turn. It compiles ``tx.update`` once; call it before training.

    Args:
      tx: any gradient transformation with one learning-rate rule or more in it.
      params: parameters of the structure, shapes and dtypes that will be trained; not changed.

    Returns:
      None.

    Raises:
      AssertionError: if ``tx`` has no rule, or a rule does not control the step size; the message tells
        where the rule stands and where to move it.

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
    step = jax.jit(_probe_step(tx))
    state = tx.init(params)
    found = _find(state, _is_rule)
    if not found:
        raise AssertionError(
            "this transformation holds no learning-rate rule. Add one, as in "
            "greedylr_jax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr())."
        )
    # Momentum and second moments must have filled: at its first step even a rule that only scales the
    # gradients of a momentum method seems to control the step.
    for _ in range(2):
        _, state = _next_move(step, params, state, state)
    for index, rule in enumerate(found):
        (before, after), _ = _next_move(step, params, state, _with_half_scale(state, index))
        _assert_halved(rule, before, after)


def _probe_step(tx: optax.GradientTransformation) -> Any:
    value = np.ones((), _numerics.default_float_dtype())
    update = _observe.bind_extra_args(tx, value=value, has_value=False).update

    def step(params: optax.Params, state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
        return update(_random_like(params), state, params)

    return step


def _random_like(params: optax.Params) -> optax.Updates:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def gradient(key: jax.Array, leaf: ArrayLike) -> jax.Array:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.zeros(shape, dtype)
        return jax.random.normal(key, shape, dtype)

    return structure.unflatten(map(gradient, keys, leaves))


def _next_move(
    step: Any, params: optax.Params, left: optax.OptState, right: optax.OptState
) -> tuple[tuple[optax.Updates, optax.Updates], optax.OptState]:
    """Steps two states to the next update that is not zero (accumulation makes zeros in between)."""
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
    """The same optimizer state, but the scale that rule number ``index`` holds is halved."""
    seen = -1

    def halve(node: Any) -> Any:
        nonlocal seen
        if not _is_rule(node):
            return node
        seen += 1
        if seen != index:
            return node
        return _rule.map_rates(lambda scale: scale / 2, node)

    return jax.tree.map(halve, opt_state, is_leaf=_or_kept(_is_rule))


def _assert_halved(rule: _Found, before: optax.Updates, after: optax.Updates) -> None:
    """Every leaf of the update must have halved, or be out of this rule's reach."""
    ratios, halved = [], False
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(left.dtype, jnp.inexact) or not np.any(np.asarray(left) != 0):
            continue
        # Halving is exact but for the rounding of what follows the rule.
        tolerance = 8 * float(jnp.finfo(left.dtype).eps)
        wide = complex if jnp.issubdtype(left.dtype, jnp.complexfloating) else float
        full, scaled = np.asarray(left).astype(wide), np.asarray(right).astype(wide)
        if np.allclose(scaled, full / 2, rtol=tolerance, atol=0):
            halved = True
        elif not np.array_equal(scaled, full):
            ratios.append(float(np.linalg.norm(scaled) / np.linalg.norm(full)))
    if halved and not ratios:
        return
    effect = f"changed the update by a factor of {ratios[0]:.3g}" if ratios else "changed nothing"
    raise AssertionError(
        f"the learning-rate rule at {rule.path} does not control the step size: halving its scale "
        f"{effect}, not 0.5. Where it stands it scales the gradients, and what follows (Adam's "
        "normalisation, momentum, clipping) undoes that. Put it after the optimizer, as in "
        "optax.chain(optax.adamw(1e-3), greedy_lr()); or use greedylr_jax.chain, in which it may stand "
        "anywhere; or make it the learning rate, as in "
        "optax.inject_hyperparams(optax.adamw)(learning_rate=greedy_lr_schedule(...))."
    )
