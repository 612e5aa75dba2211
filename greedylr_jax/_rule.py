"""Rules and their adapters: how a learning-rate rule gets into a training step.

A *rule* is a small state machine: it observes one loss at a time and holds a multiplier for the learning
rate, its ``scale``. It does not depend on Optax. Two *adapters* bring any such rule into a training step:

* :func:`scale_by_rule`, a gradient transformation that multiplies the updates by the scale;
* :func:`schedule_by_rule`, a stateful schedule whose value is the learning rate.

Both adapters agree on the timing: the loss passed at a step is the loss *before* that step's update, and
that update already uses the rule's answer to it. :func:`greedylr_jax.chain` is a drop-in for ``optax.chain``
in which a rule acts on the learning rate wherever it stands.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _misplaced, _numerics, _observe


class Rule(NamedTuple):
    """A zeroth-order learning-rate rule: a state machine over loss values.

    A rule defined by these two functions has both adapters, :func:`greedylr_jax.chain`, ``every``,
    ``has_value``, ``axis_name``, the readers (:func:`greedylr_jax.get_scale`, ...) and the setters. Both are
    pure functions of arrays, so they can be compiled, mapped and scanned.

    Attributes:
      init: maps the initial multiplier (a float scalar; 1 in a gradient transformation, the initial
        learning rate in a schedule) to the initial state, a NamedTuple of arrays with at least the field
        ``scale``, the current multiplier.
      update: maps the state and one loss (a float scalar, possibly not finite) to the next state, of
        the same structure, shapes and dtypes.
      name: the rule's name in error messages.
      observes: names of further scalars that the rule observes, such as ``"validation_value"``. They are
        extra arguments of the adapter's ``update``, averaged over devices like the loss, and are passed to
        ``update`` by name; None if a step has none. With ``every`` they are those of the deciding step.

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
    """State of a rule in either adapter."""

    rule: Any  # the rule's own state, a NamedTuple with the field `scale`
    value_sum: jax.Array  # shape=(), dtype=float; sum of the losses since the last decision
    value_count: jax.Array  # shape=(), dtype=int32; the number of these losses


class RuleScheduleState(NamedTuple):
    """State of a rule in a schedule: its ``scale`` is the learning rate."""

    init_value: jax.Array  # shape=(), dtype=float; the initial learning rate
    rule_state: RuleState


class RateState(NamedTuple):
    """Learning rates in the state of an optimizer that has its own, where the readers find them."""

    learning_rate: Any  # a float scalar, a dict from group labels to such, or a pytree like the params


class ComputedRateState(RateState):
    """Learning rates that an optimizer computes anew at each step: they can be read, but not set."""

    __slots__ = ()


def is_rate_state(node: Any) -> bool:
    """Whether a node of an optimizer state holds a rule's scale, or learning rates."""
    return isinstance(node, (RuleState, RuleScheduleState, RateState))


def map_rates(change: Callable[..., jax.Array], node: Any, *others: Any) -> Any:
    """Changes the scale or the rates of a node for which :func:`is_rate_state` is true.

    Args:
      change: maps the scale or rate, and those of ``others``, to the new one.
      node: any node of an optimizer state; nodes without a scale or rate, or whose rates are computed at each
        step, are returned as they are.
      *others: nodes of the same structure.
    """
    if isinstance(node, RuleScheduleState):
        rule_state = map_rates(change, node.rule_state, *(other.rule_state for other in others))
        return node._replace(rule_state=rule_state)
    if isinstance(node, RuleState):
        scale = change(node.rule.scale, *(other.rule.scale for other in others))
        return node._replace(rule=node.rule._replace(scale=scale))
    if isinstance(node, RateState) and not isinstance(node, ComputedRateState):
        rates = (other.learning_rate for other in others)
        return RateState(jax.tree.map(change, node.learning_rate, *rates))
    return node


class GradientTransformationExtraLoss(optax.GradientTransformationExtraArgs):
    """A gradient transformation whose ``update`` needs the loss: ``update(..., value=loss)``.

    Its ``update`` has the signature
    ``update(updates, state, params=None, *, value, has_value=None, **extra_args)``:

    * ``value``: the scalar loss at ``params``, before this update;
    * ``has_value``: False (a Python bool or a boolean scalar array) if this step has no new observation.
      The rule then keeps its state and ignores ``value``, which may be omitted if ``has_value`` is the
      Python constant False.

    Examples:
      >>> import jax.numpy as jnp, greedylr_jax
      >>> tx = greedylr_jax.greedy_lr()
      >>> isinstance(tx, greedylr_jax.GradientTransformationExtraLoss)
      True
      >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=0.5)
    """

    if TYPE_CHECKING:  # Optax's types allow no state of a certain type

        def __new__(cls, init: Callable[..., Any], update: Callable[..., Any]) -> Self: ...


class ScaleByRule(GradientTransformationExtraLoss):
    """A transformation that only multiplies the updates by its rule's scale.

    :func:`greedylr_jax.chain` recognises rules by this type and applies them last. In a plain
    ``optax.chain`` a position without effect causes a :class:`greedylr_jax.MisplacedRuleWarning`.
    """

    def __new__(cls, init: Callable[..., Any], update: Callable[..., Any]) -> Self:
        return super().__new__(cls, *_misplaced.with_check(init, update))


def scale_by_rule(
    rule: Rule, *, every: ArrayLike = 1, axis_name: Hashable | None = None
) -> GradientTransformationExtraLoss:
    """A rule as a gradient transformation that multiplies the updates by the rule's scale.

    Place it after the optimizer (``optax.chain(optax.adamw(1e-3), scale_by_rule(rule))``) or anywhere in a
    :func:`greedylr_jax.chain`. The initial scale is 1. Products are computed in the wider of the two dtypes
    and rounded once to the updates' dtype; leaves that are not floating point or complex are unchanged.

    Args:
      rule: the rule, see :class:`Rule`.
      every: number of losses whose mean is one observation (an "epoch"); the rule decides at the last of
        them. An integer >= 1, which may be traced; default 1. If one loss is not finite, neither is the mean.
      axis_name: mapped axis, or axes, over which the loss is averaged first, so that all devices make the
        same decision (under ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` with this axis name). A traced
        ``has_value`` may differ between devices: the mean is over those that have a loss.

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
    """An Optax stateful schedule whose value is the scale of a rule, see :func:`schedule_by_rule`.

    Examples:
      >>> import greedylr_jax
      >>> schedule = greedylr_jax.greedy_lr_schedule(0.5, min_learning_rate=0.1, max_learning_rate=1.0)
      >>> isinstance(schedule, greedylr_jax.RuleSchedule)
      True
      >>> print(schedule(schedule.init()))
      0.5
    """

    rule: Rule
    init_value: ArrayLike
    every: ArrayLike
    axis_name: Hashable | None

    def init(self) -> RuleScheduleState:
        """The initial state."""
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
        """The state after observing the loss ``value``."""
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
        """The learning rate after observing ``value``; the current one without ``value``. A new array."""
        if value is not None:
            state = self.update(state, value=value, has_value=has_value, **extra_args)
        return _numerics.weakly_typed(state.rule_state.rule.scale)


def schedule_by_rule(
    rule: Rule,
    init_value: ArrayLike,
    *,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> RuleSchedule:
    """A rule as an Optax stateful schedule: the rule's scale *is* the learning rate.

    Use it as ``optax.inject_hyperparams(optax.adamw)(learning_rate=schedule_by_rule(rule, 1e-3))``; the
    current rate is then ``opt_state.hyperparams["learning_rate"]``, and ``update`` requires ``value=loss``.

    ``optax.inject_hyperparams`` converts all hyperparameters to the parameters' dtype. In bfloat16 Adam's
    ``b2=0.999`` rounds to 1, and its bias correction divides by zero: for parameters in bfloat16 or float16
    pass ``hyperparam_dtype=jnp.float32`` to ``inject_hyperparams``. The updates are then float32;
    ``optax.apply_updates`` rounds the new parameters to their dtype. The rate in the schedule's state is
    float32 in either case.

    Args:
      rule: the rule, see :class:`Rule`. Its bounds, if it has any, are learning rates here.
      init_value: the initial learning rate, > 0.
      every: as in :func:`scale_by_rule`.
      axis_name: as in :func:`scale_by_rule`.

    Returns:
      A stateful schedule ``s`` with ``state = s.init()``, ``state = s.update(state, value=loss)``,
      ``rate = s(state)``, and ``s(state, value=loss)``, the rate after observing ``loss``.

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
    """Passes one loss to the rule, averaged over devices and over ``every`` losses."""
    dtype = state.value_sum.dtype
    observation = _observe.read(rule.name, value, has_value, dtype, axis_name)
    if observation.is_absent:
        return state
    further = {
        name: _observe.read_optional(rule.name, name, extra_args.get(name), dtype, axis_name)
        for name in rule.observes
    }
    decides_each_step = not _checks.is_traced(every) and every == 1
    if decides_each_step and observation.is_present:
        return state._replace(rule=rule.update(state.rule, observation.value, **further))

    value_sum, value_count, mean = _observe.accumulate(state.value_sum, state.value_count, observation)
    decides = observation.has_value & (value_count >= jnp.asarray(every, jnp.int32))
    return RuleState(
        rule=_numerics.select(decides, rule.update(state.rule, mean, **further), state.rule),
        value_sum=_numerics.where(decides, 0, value_sum),
        value_count=_numerics.where(decides, 0, value_count),
    )
