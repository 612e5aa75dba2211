"""Rules and their carriers: how a learning-rate rule gets into a training step.

A *rule* is a small state machine: it sees one loss at a time and holds a multiplier for the learning
rate, its ``scale``. It knows nothing of Optax. The *carriers* in this file bring any such rule into a
training step:

* :func:`scale_by_rule`, a gradient transformation that multiplies the updates;
* :func:`schedule_by_rule`, a stateful schedule that is the learning rate itself;
* :func:`chain`, a drop-in for ``optax.chain`` in which a rule acts on the learning rate wherever it
  stands.

Both carriers observe through one function, so they agree on the timing: the loss passed at a step is
the loss *before* that step's update, and it already acts on that update.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _observe


class Rule(NamedTuple):
    """A zeroth-order learning-rate rule: a state machine over loss values.

    Write one to get both carriers, ``chain``, ``every``, ``has_value``, ``axis_name`` and the readers
    of :mod:`greedylr_jax.reading` for it. Both functions are pure functions of arrays, so they can be
    compiled, mapped and scanned.

    Attributes:
      init: from the starting multiplier (a float scalar; 1 in a gradient transformation, the initial
        learning rate in a schedule) to the first state, a NamedTuple of arrays with at least the field
        ``scale``, the multiplier that the rule holds.
      update: from the state and one loss (a float scalar, possibly not finite) to the next state, of
        the same structure, shapes and dtypes.
      name: what error messages call the rule.
      observes: names of further scalars that the rule looks at, such as ``"validation_value"``. They are
        extra arguments of the carrier's ``update``, averaged over devices like the loss, and reach ``update``
        by name; None where a step brings none. With ``every`` they are those of the step that decides.

    Examples:
      A rule that cuts the rate by 10 whenever the loss is not finite:

      >>> from typing import NamedTuple
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> class CutState(NamedTuple):
      ...     scale: jax.Array  # shape=(), dtype=float
      >>> def update(state, value):
      ...     return CutState(jnp.where(jnp.isfinite(value), state.scale, state.scale / 10))
      >>> cut_on_overflow = greedylr_jax.Rule(init=CutState, update=update, name="cut_on_overflow")
      >>> tx = optax.chain(optax.sgd(0.1), greedylr_jax.scale_by_rule(cut_on_overflow))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=jnp.inf)
      >>> print(updates, greedylr_jax.get_scale(state))
      [-0.01 -0.01 -0.01] 0.1
    """

    init: Callable[[jax.Array], Any]
    update: Callable[..., Any]
    name: str = "rule"
    observes: tuple[str, ...] = ()


class RuleState(NamedTuple):
    """What every carrier keeps for its rule."""

    rule: Any  # the rule's own state, a NamedTuple with the field `scale`
    value_sum: jax.Array  # shape=(), dtype=float; sum of the losses since the last decision
    value_count: jax.Array  # shape=(), dtype=int32; how many they are


class RuleScheduleState(NamedTuple):
    """State of a rule that is a schedule: its ``scale`` is the learning rate itself."""

    init_value: jax.Array  # shape=(), dtype=float; the learning rate at the start
    rule_state: RuleState


class RateState(NamedTuple):
    """Learning rates that an optimizer keeps itself, where the readers find them."""

    learning_rate: Any  # a float scalar; or a dict from group labels to such; or a pytree like the params


def is_rate_state(node: Any) -> bool:
    """Whether a node of an optimizer state holds a rule's scale, or learning rates."""
    return isinstance(node, (RuleState, RuleScheduleState, RateState))


def map_rates(change: Callable[..., jax.Array], node: Any, *others: Any) -> Any:
    """Such a node with its scale or rates changed, given those of nodes like it; any other as it is."""
    if isinstance(node, RuleScheduleState):
        rule_state = map_rates(change, node.rule_state, *(other.rule_state for other in others))
        return node._replace(rule_state=rule_state)
    if isinstance(node, RuleState):
        scale = change(node.rule.scale, *(other.rule.scale for other in others))
        return node._replace(rule=node.rule._replace(scale=scale))
    if isinstance(node, RateState):
        rates = (other.learning_rate for other in others)
        return RateState(jax.tree.map(change, node.learning_rate, *rates))
    return node


class GradientTransformationExtraLoss(optax.GradientTransformationExtraArgs):
    """A gradient transformation whose ``update`` needs the loss: ``update(..., value=loss)``.

    Its ``update`` has the signature
    ``update(updates, state, params=None, *, value, has_value=None, **extra_args)``:

    * ``value``: the scalar loss at ``params``, before this update;
    * ``has_value``: False (a Python bool or a boolean scalar array) says that this step brings no new
      observation; the rule then keeps its state and ``value`` is ignored (it may be omitted where
      ``has_value`` is the Python constant False).

    Examples:
      >>> import jax.numpy as jnp, greedylr_jax
      >>> tx = greedylr_jax.greedy_lr()
      >>> isinstance(tx, greedylr_jax.GradientTransformationExtraLoss)
      True
      >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=0.5)
    """


class ScaleByRule(GradientTransformationExtraLoss):
    """A transformation that does nothing but multiply the updates by its rule's scale.

    This is what lets :func:`chain` move it: a factor on the final step commutes with nothing before
    it, but means the same wherever it was written.
    """


def scale_by_rule(
    rule: Rule, *, every: ArrayLike = 1, axis_name: Hashable | None = None
) -> GradientTransformationExtraLoss:
    """Carries a rule as a gradient transformation that multiplies the updates by the rule's scale.

    Put it after the optimizer (``optax.chain(optax.adamw(1e-3), scale_by_rule(rule))``) or anywhere in a
    :func:`chain`. The scale starts at 1. Products are taken in the wider of the two dtypes and rounded
    once to the updates' dtype; leaves that are not floating point or complex pass unchanged.

    Args:
      rule: the rule, see :class:`Rule`.
      every: decide on the mean of this many losses (an "epoch"), at the last of them; an integer >= 1,
        which may be traced. A non-finite loss makes its mean non-finite, and so "worse".
      axis_name: the mapped axis, or axes, over which the loss is averaged first, so that all devices
        decide alike (under ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` with this axis name).

    Returns:
      A :class:`GradientTransformationExtraLoss`, whose state is a :class:`RuleState`.

    Raises:
      ValueError: if ``every`` is not a positive integer. Its ``update`` raises ``TypeError`` or
        ``ValueError`` if ``value`` is missing or not a real scalar.

    Examples:
      See :class:`Rule`.
    """
    every = _checks.check_integer("every", every, low=1)

    def init_fn(params: optax.Params) -> RuleState:
        del params
        return _init_rule(rule, 1.0)

    def update_fn(
        updates: optax.Updates,
        state: RuleState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RuleState]:
        del params
        state = _next_state(rule, state, value, has_value, every, axis_name, extra_args)
        return _numerics.scale_updates(updates, state.rule.scale), state

    return ScaleByRule(init_fn, update_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class RuleSchedule:
    """An Optax stateful schedule whose value is the scale of a rule, see :func:`schedule_by_rule`."""

    rule: Rule
    init_value: ArrayLike
    every: ArrayLike
    axis_name: Hashable | None

    def init(self) -> RuleScheduleState:
        """The state before the first loss."""
        rule_state = _init_rule(self.rule, self.init_value)
        return RuleScheduleState(
            init_value=jnp.array(self.init_value, rule_state.value_sum.dtype), rule_state=rule_state
        )

    def update(
        self,
        state: RuleScheduleState,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> RuleScheduleState:
        """The state after the loss ``value`` was observed."""
        rule_state = _next_state(
            self.rule, state.rule_state, value, has_value, self.every, self.axis_name, extra_args
        )
        return state._replace(rule_state=rule_state)

    def __call__(
        self,
        state: RuleScheduleState,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> jax.Array:
        """The learning rate that observing ``value`` leads to; without ``value``, the current one."""
        if value is not None:
            state = self.update(state, value=value, has_value=has_value, **extra_args)
        return state.rule_state.rule.scale


def schedule_by_rule(
    rule: Rule,
    init_value: ArrayLike,
    *,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> RuleSchedule:
    """Carries a rule as an Optax stateful schedule: the rule's scale *is* the learning rate.

    Use it as ``optax.inject_hyperparams(optax.adamw)(learning_rate=schedule_by_rule(rule, 1e-3))``; the
    current rate is then ``opt_state.hyperparams["learning_rate"]``, and ``update`` needs ``value=loss``.

    Args:
      rule: the rule, see :class:`Rule`; bounds that it knows are absolute learning rates here.
      init_value: the initial learning rate, > 0.
      every: as in :func:`scale_by_rule`.
      axis_name: as in :func:`scale_by_rule`.

    Returns:
      A stateful schedule ``s`` with ``state = s.init()``, ``state = s.update(state, value=loss)``,
      ``rate = s(state)``, and ``s(state, value=loss)`` the rate that observing ``loss`` leads to.

    Raises:
      ValueError: if ``init_value`` or ``every`` is out of range.

    Examples:
      >>> from typing import NamedTuple
      >>> import jax, greedylr_jax
      >>> class HalveState(NamedTuple):
      ...     scale: jax.Array  # shape=(), dtype=float
      >>> halve = greedylr_jax.Rule(
      ...     init=HalveState, update=lambda state, value: HalveState(state.scale / 2))
      >>> schedule = greedylr_jax.schedule_by_rule(halve, 0.5, every=2)
      >>> state = schedule.update(schedule.init(), value=1.0)
      >>> print(schedule(state), schedule(state, value=1.0))
      0.5 0.25
    """
    init_value = _checks.check_real("init_value", init_value, low=0.0, low_open=True, high_open=True)
    every = _checks.check_integer("every", every, low=1)
    return RuleSchedule(rule, init_value, every, axis_name)


def _init_rule(rule: Rule, initial: ArrayLike) -> RuleState:
    dtype = _numerics.default_float_dtype()
    return RuleState(
        rule=rule.init(jnp.array(initial, dtype)),
        value_sum=jnp.zeros((), dtype),
        value_count=jnp.zeros((), jnp.int32),
    )


def _next_state(
    rule: Rule,
    state: RuleState,
    value: ArrayLike | None,
    has_value: ArrayLike | None,
    every: ArrayLike,
    axis_name: Hashable | None,
    extra_args: Mapping[str, Any],
) -> RuleState:
    """Hands one loss to the rule: averaged over devices, and over ``every`` losses."""
    if _checks.is_known_false(has_value):
        return state
    if not _checks.is_traced(has_value):
        has_value = None
    dtype = state.value_sum.dtype

    def read(name: str, given: ArrayLike | None) -> jax.Array:
        return _observe.average(_observe.check_loss(rule.name, given, name).astype(dtype), axis_name)

    loss = read("value", value)
    observations = {
        name: None
        if extra_args.get(name) is None
        else _observe.average(
            _observe.check_loss(rule.name, extra_args[name], name).astype(loss.dtype), axis_name
        )
        for name in rule.observes
    }
    decides_each_step = not _checks.is_traced(every) and every == 1
    if decides_each_step and has_value is None:
        return state._replace(rule=rule.update(state.rule, loss, **observations))

    observed = jnp.asarray(True if has_value is None else has_value, bool)
    value_sum = state.value_sum + loss
    value_count = state.value_count + 1
    decides = observed & (value_count >= jnp.asarray(every, jnp.int32))
    mean = value_sum / value_count.astype(value_sum.dtype)
    decided = RuleState(
        rule=rule.update(state.rule, mean, **observations),
        value_sum=jnp.zeros_like(value_sum),
        value_count=jnp.zeros_like(value_count),
    )
    collected = RuleState(rule=state.rule, value_sum=value_sum, value_count=value_count)
    return _numerics.select(decides, decided, _numerics.select(observed, collected, state))
