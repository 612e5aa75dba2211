"""Reading and setting the learning rate in an optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _rule


class Found(NamedTuple):
    """A rule, or an optimizer with its own learning rate, in an optimizer state."""

    group: str  # the dictionary keys in its path, such as the labels of optax.partition, joined by "/"
    path: tuple[Any, ...]  # its path in the optimizer state, as jax.tree_util gives it
    state: Any  # a RuleState, RuleScheduleState or RateState
    label: str | None = None  # which of the rates, if the optimizer has one for each group

    @property
    def written(self) -> str:
        """The path as a Python expression."""
        label = "" if self.label is None else f"[{self.label!r}]"
        return "opt_state" + jax.tree_util.keystr(self.path) + label


def is_rule(node: Any) -> bool:
    """Whether a node of an optimizer state is the state of a rule, in either adapter."""
    return isinstance(node, (_rule.RuleState, _rule.RuleScheduleState))


def _is_rate(node: Any) -> bool:
    return isinstance(node, _rule.RateState)


def find(opt_state: optax.OptState, wanted: Callable[[Any], bool] = is_rule) -> list[Found]:
    """All nodes of an optimizer state for which ``wanted`` is true, by default the rules."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=wanted)
    found = []
    for path, node in nodes:
        if wanted(node):
            keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            if isinstance(node, _rule.RuleScheduleState):
                keys = keys[:-1]  # inject_hyperparams stores a schedule under the name of its argument
            found.append(Found("/".join(keys), path, node))
    return found


def _find_rates(opt_state: optax.OptState) -> list[Found]:
    """The learning rates of optimizers with their own; one entry per label if they are per group."""
    split = []
    for found in find(opt_state, _is_rate):
        rates = found.state.learning_rate
        if isinstance(rates, dict) and all(_is_scalar(value) for value in rates.values()):
            for label, value in rates.items():
                name = "/".join(filter(None, (found.group, label)))
                split.append(Found(name, found.path, type(found.state)(value), label))
        else:
            split.append(found)
    return split


def _is_scalar(value: Any) -> bool:
    """Whether this is one number; per-parameter rates hold arrays, trees and masked nodes."""
    plain = _plain(value)
    return jax.tree.structure(plain) == jax.tree.structure(0) and jnp.shape(plain) == ()


def _only(found: list[Found], group: str | None, kind: str) -> Found:
    """The only entry, or the only one of a group; raises ``ValueError`` if there is none, or several."""
    if not found:
        raise ValueError(
            "this optimizer state holds no learning-rate rule. Add one, as in "
            "greedylr_jax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr())."
        )
    matching = found if group is None else [each for each in found if each.group == group]
    if len(matching) != 1:
        places = "; ".join(f"group {each.group!r} at {each.written}" for each in found)
        raise ValueError(
            f"group={group!r} matches {len(matching)} {kind} of this optimizer state, and must match one. "
            f"The state holds: {places}. To read all of them, use greedylr_jax.metrics."
        )
    return matching[0]


def _plain(value: Any) -> Any:
    """A pytree with new plain arrays as leaves, which stay valid if the state is donated.

    In the state of ``flax.nnx.Optimizer`` each array is wrapped in a variable, which is itself a pytree.
    """
    return jax.tree.map(lambda leaf: _numerics.fresh(jnp.asarray(leaf)), value, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return not isinstance(node, jax.Array) and hasattr(node, "__jax_array__")


def _rule_state(state: Any) -> Any:
    """The rule's own state, in either adapter."""
    return state.rule_state.rule if isinstance(state, _rule.RuleScheduleState) else state.rule


def _scale(state: Any) -> jax.Array:
    scale = _plain(_rule_state(state).scale)
    if isinstance(state, _rule.RuleScheduleState):
        return scale / _plain(state.init_value)
    return scale


def get_scale(opt_state: optax.OptState, *, group: str | None = None) -> jax.Array:
    """The multiplier of the learning-rate rule in an optimizer state, as used by the last update.

    For a rule in a schedule it is the current learning rate divided by the initial one.

    Args:
      opt_state: any nesting of Optax states (chains, wrappers, ``inject_hyperparams``, partitions), or the
        ``opt_state`` of ``flax.nnx.Optimizer``.
      group: which rule, if there are several: the labels in the path to it, as in
        ``optax.partition({"encoder": ..., "decoder": ...}, ...)``; None: the only one.

    Returns:
      A float scalar, a new array. Works under ``jax.jit``.

    Raises:
      ValueError: if there is no rule, or more than one that matches ``group``.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr(patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> print(greedylr_jax.get_scale(state))
      1.0526316
    """
    return _scale(_only(find(opt_state), group, "learning-rate rules").state)


def get_learning_rate(
    opt_state: optax.OptState,
    base_learning_rate: ArrayLike | None = None,
    *,
    group: str | None = None,
) -> Any:
    """The learning rate that the last update used.

    This is the base learning rate times the rule's scale. The base rate is that of an optimizer with its own
    learning rate, such as :func:`greedylr_jax.hypergradient`, if there is one.

    Args:
      opt_state: any nesting of Optax states, as in :func:`get_scale`.
      base_learning_rate: the optimizer's learning rate, a scalar, which the rule multiplies. Not needed if
        the rule is a schedule, or if the optimizer's state holds the rate
        (``optax.inject_hyperparams``, :func:`greedylr_jax.hypergradient`).
      group: which rule, if there are several, as in :func:`get_scale`.

    Returns:
      A float scalar, or a pytree like the parameters if there is one rate per element; new arrays. Works
      under ``jax.jit``.

    Raises:
      ValueError: if there is no rule, more than one that matches ``group``, or no base rate.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.sgd(0.5), greedylr_jax.greedy_lr(factor=0.5, patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> print(greedylr_jax.get_learning_rate(state, base_learning_rate=0.5))
      1.0
    """
    rules, rates = find(opt_state), _find_rates(opt_state)
    if not rules and rates:
        return _plain(_only(rates, group, "learning rates").state.learning_rate)
    state = _only(rules, group, "learning-rate rules").state
    if isinstance(state, _rule.RuleScheduleState):
        return _plain(state.rule_state.rule.scale)
    scale = _scale(state)
    base = _base_rate(opt_state, base_learning_rate, rates, group)
    return jax.tree.map(lambda rate: jnp.asarray(rate, scale.dtype) * scale, base)


def _base_rate(opt_state: optax.OptState, given: Any, rates: list[Found], group: str | None) -> Any:
    """The learning rate that a rule multiplies."""
    if callable(given):
        raise ValueError(
            "base_learning_rate must be a number, got a schedule: pass schedule(step) for the step in "
            "question."
        )
    if given is not None:
        return given
    if rates:
        return _plain(_only(rates, group, "learning rates").state.learning_rate)
    injected = optax.tree.get_all_with_path(opt_state, "learning_rate")
    if len(injected) != 1:
        raise ValueError(
            "base_learning_rate is needed: this optimizer state holds only the rule's multiplier. Pass the "
            "learning rate of the optimizer, or build the optimizer with optax.inject_hyperparams."
        )
    return _plain(injected[0][1])


def metrics(opt_state: optax.OptState, *, prefix: str = "") -> dict[str, jax.Array]:
    """All scalars of the rules in an optimizer state, as a flat dict for loggers.

    Args:
      opt_state: any nesting of Optax states, as in :func:`get_scale`.
      prefix: prepended to every key, such as ``"train/"``.

    Returns:
      A dict from names to scalars: ``scale``; ``learning_rate``, of a rule that is a schedule, or the rate of
      an optimizer with its own, before the scale of a rule that follows it (for rates per element,
      ``learning_rate_min``, ``_mean`` and ``_max``); the other scalar fields of the rule's state
      under their names; and ``num_rollbacks`` and ``num_skipped`` of :func:`greedylr_jax.with_rollback` and
      :func:`greedylr_jax.lr_tuner`. Dictionary keys in the path to a
      rule (``optax.partition``) come first: ``"encoder/scale"``. Several rules of the same name are
      distinguished by a number: ``"1/scale"``. Works under ``jax.jit``.

    Raises:
      ValueError: if there is none of these.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr(patience=0))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
      >>> logged = greedylr_jax.metrics(state, prefix="lr/")
      >>> print(logged["lr/scale"], logged["lr/best_value"])
      1.0526316 1.0
    """
    found = find(opt_state) + _find_rates(opt_state) + _find_counts(opt_state)
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


class _Counts(NamedTuple):
    """How often :func:`greedylr_jax.with_rollback` or :func:`greedylr_jax.lr_tuner` has intervened."""

    num_rollbacks: jax.Array
    num_skipped: jax.Array


def _find_counts(opt_state: optax.OptState) -> list[Found]:
    """The counts of all optimizers that restore snapshots, however they are nested."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_variable)
    counts: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, leaf in leaves:
        name = getattr(path[-1], "name", None) if path else None
        if name in _Counts._fields:
            counts.setdefault(path[:-1], {})[name] = leaf
    found = []
    for path, fields in counts.items():
        if len(fields) < len(_Counts._fields):  # an optimizer of another package
            continue
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        found.append(Found("/".join(keys), path, _Counts(**fields)))
    return found


def _scalars(state: Any) -> dict[str, jax.Array]:
    if isinstance(state, _Counts):
        return _plain(state._asdict())
    if isinstance(state, _rule.RateState):
        return _range_of_rates(_plain(state.learning_rate))
    fields = {"scale": _scale(state)}
    if isinstance(state, _rule.RuleScheduleState):
        fields["learning_rate"] = _plain(state.rule_state.rule.scale)
    for name, field in _rule_state(state)._asdict().items():
        if name not in fields and not isinstance(field, tuple) and jnp.shape(_plain(field)) == ():
            fields[name] = _plain(field)
    return fields


def _range_of_rates(rates: Any) -> dict[str, jax.Array]:
    """A single rate; minimum, mean and maximum of a pytree of rates."""
    leaves = jax.tree.leaves(rates)
    if len(leaves) == 1 and jnp.shape(leaves[0]) == ():
        return {"learning_rate": leaves[0]}
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) if leaves else jnp.zeros(0)
    if flat.size == 0:  # one rate per element, of parameters without elements
        return {}
    return {
        "learning_rate_min": jnp.min(flat),
        "learning_rate_mean": jnp.mean(flat),
        "learning_rate_max": jnp.max(flat),
    }


def set_scale(opt_state: optax.OptState, scale: ArrayLike, *, group: str | None = None) -> optax.OptState:
    """Sets the multiplier of the learning-rate rule in an optimizer state.

    The rule continues from the new scale: it decides on the loss of the next step first, then the update
    uses the scale. A scale outside the rule's bounds is clipped at its next observation
    (:func:`greedylr_jax.arc.arc`: at the end of the cycle; :func:`greedylr_jax.factor_polling`: at the next
    poll).

    Args:
      opt_state: any nesting of Optax states, as in :func:`get_scale`.
      scale: the new multiplier, in (0, inf); may be traced. For a rule in a schedule the learning rate is
        this times the initial one.
      group: which rule, if there are several, as in :func:`get_scale`.

    Returns:
      A new optimizer state of the same structure. With NNX, assign it to ``optimizer.opt_state``. Works under
      ``jax.jit``.

    Raises:
      ValueError: if ``scale`` is out of its range, if there is no rule, or more than one that matches
        ``group``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import get_scale, greedy_lr, set_scale
      >>> tx = optax.chain(optax.sgd(0.5), greedy_lr(factor=0.5, patience=1))
      >>> params = jnp.ones(2)
      >>> state = set_scale(tx.init(params), 4.0)
      >>> updates, state = tx.update(params, state, params, value=1.0)
      >>> print(updates, get_scale(state))
      [-2. -2.] 4.0
    """
    scale = _checks.check_real("scale", scale, low=0.0, low_open=True, high_open=True)
    found = _only(find(opt_state), group, "learning-rate rules")
    if isinstance(found.state, _rule.RuleScheduleState):
        initial = _plain(found.state.init_value)
        scale = jnp.asarray(scale, initial.dtype) * initial
    return _replace_rate(opt_state, found, scale)


def set_learning_rate(
    opt_state: optax.OptState,
    learning_rate: Any,
    base_learning_rate: ArrayLike | None = None,
    *,
    group: str | None = None,
) -> optax.OptState:
    """Sets the learning rate in an optimizer state; the inverse of :func:`get_learning_rate`.

    If a rule multiplies a base rate, its scale becomes ``learning_rate / base_learning_rate``. If the rule is
    a schedule, or the optimizer has its own learning rate and no rule, the rate itself is set. Rule or
    optimizer continue from there, as in :func:`set_scale`.

    Args:
      opt_state: any nesting of Optax states, as in :func:`get_scale`.
      learning_rate: the new learning rate, a scalar in (0, inf), which may be traced; or a pytree of rates
        like the optimizer's own, such as :func:`get_learning_rate` returns.
      base_learning_rate: as in :func:`get_learning_rate`.
      group: which rule, if there are several, as in :func:`get_scale`.

    Returns:
      A new optimizer state of the same structure. With NNX, assign it to ``optimizer.opt_state``. Works under
      ``jax.jit``.

    Raises:
      ValueError: if ``learning_rate`` is out of its range, if there is no rule, more than one that matches
        ``group``, no base rate, or a base rate for each element; or if the optimizer computes its rate anew
        at each step (:func:`greedylr_jax.auto_lr`, :func:`greedylr_jax.scale_to_parameters`).

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import get_learning_rate, greedy_lr_schedule, set_learning_rate
      >>> schedule = greedy_lr_schedule(1e-3, min_learning_rate=1e-4, max_learning_rate=0.1)
      >>> state = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule).init(jnp.ones(2))
      >>> print(get_learning_rate(set_learning_rate(state, 0.01)))
      0.01
    """
    rules, rates = find(opt_state), _find_rates(opt_state)
    is_scalar = jax.tree.structure(learning_rate) == jax.tree.structure(0)
    if is_scalar:
        learning_rate = _checks.check_real(
            "learning_rate", learning_rate, low=0.0, low_open=True, high_open=True
        )
    if not rules and rates:
        found = _only(rates, group, "learning rates")
        if isinstance(found.state, _rule.ComputedRateState):
            raise ValueError(
                "the learning rate of this optimizer cannot be set, because it is computed anew at each step "
                "(auto_lr, scale_to_parameters). Scale its updates with a rule, as in "
                "optax.chain(auto_lr(optax.adamw(1.0)), greedy_lr()), and use greedylr_jax.set_scale."
            )
        return _replace_rate(opt_state, found, learning_rate)
    found = _only(rules, group, "learning-rate rules")
    if isinstance(found.state, _rule.RuleScheduleState):
        return _replace_rate(opt_state, found, learning_rate)
    base = _base_rate(opt_state, base_learning_rate, rates, group)
    if not is_scalar or jax.tree.structure(base) != jax.tree.structure(0):
        raise ValueError(
            "learning_rate and the base learning rate must be scalars if a rule multiplies them. To set the "
            "rule's multiplier use greedylr_jax.set_scale."
        )
    dtype = _scale(found.state).dtype
    return _replace_rate(opt_state, found, jnp.asarray(learning_rate, dtype) / jnp.asarray(base, dtype))


def _replace_rate(opt_state: optax.OptState, found: Found, rate: Any) -> optax.OptState:
    """The optimizer state with the scale or rate of one node, which is at ``found.path``, replaced."""

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        if path == found.path:
            return _with_rate(node, found.label, rate)
        if (
            injected and path[: len(injected)] == injected
        ):  # inject_hyperparams stores the current value of a schedule, too
            return jax.tree.map(lambda old: jnp.asarray(rate, old.dtype), node)
        return node

    injected = None
    if isinstance(found.state, _rule.RuleScheduleState) and len(found.path) > 1:
        *above, _, name = found.path
        injected = (*above, jax.tree_util.GetAttrKey("hyperparams"), name)

    def is_leaf(node: Any) -> bool:
        return is_rule(node) or _is_rate(node)

    return jax.tree_util.tree_map_with_path(replace, opt_state, is_leaf=is_leaf)


def _with_rate(node: Any, label: str | None, rate: Any) -> Any:
    """A node with its scale or rates set to one number, or to a pytree of their structure."""

    def fill(old: Any, new: Any) -> Any:
        # Within an NNX variable the array is replaced, not the variable.
        return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(new, leaf.dtype), leaf.shape), old)

    if label is not None:
        rates = dict(node.learning_rate)
        return node._replace(learning_rate=rates | {label: fill(rates[label], rate)})
    if jax.tree.structure(rate) == jax.tree.structure(0):
        return _rule.map_rates(lambda old: fill(old, rate), node)
    if isinstance(node, _rule.RateState):
        return node._replace(learning_rate=jax.tree.map(fill, node.learning_rate, rate))
    raise ValueError(f"learning_rate must be a scalar for a rule, got {jax.tree.structure(rate)}.")
