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
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks

RuleStateT = TypeVar("RuleStateT")


def default_float_dtype() -> jnp.dtype:
    """The dtype of rates and averages: float32, or float64 when JAX runs with 64 bits."""
    return jnp.result_type(float)


class Rule(NamedTuple):
    """A zeroth-order learning-rate rule: a state machine over loss values.

    Write one to get both carriers, ``chain``, ``every``, ``has_value``, ``axis_name`` and the readers
    of :mod:`greedylr_jax.reading` for it. Both functions are pure functions of arrays, so they can be
    compiled, mapped and scanned.

    Attributes:
      init: from the starting multiplier (a float scalar; 1 in a gradient transformation, the initial
        learning rate in a schedule) to the first state, a NamedTuple of arrays with at least the field
        ``scale``, the multiplier that the rule holds. It may have a method ``readings()``, a dict of what
        :func:`greedylr_jax.metrics` shows in place of its fields.
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
    carried: RuleState


class RateState(NamedTuple):
    """Learning rates that an optimizer keeps itself, where the readers find them."""

    learning_rate: Any  # a float scalar; or a dict from group labels to such; or a pytree like the params


def is_rate_state(node: Any) -> bool:
    """Whether a node of an optimizer state holds a rule's scale, or learning rates."""
    return isinstance(node, (RuleState, RuleScheduleState, RateState))


def map_rates(change: Callable[..., jax.Array], node: Any, *others: Any) -> Any:
    """Such a node with its scale or rates changed, given those of nodes like it; any other as it is."""
    if isinstance(node, RuleScheduleState):
        carried = map_rates(change, node.carried, *(other.carried for other in others))
        return node._replace(carried=carried)
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


class _Chain(optax.GradientTransformationExtraArgs):
    """The result of :func:`chain`, which remembers its links so that an outer chain can reorder them."""

    links: tuple[optax.GradientTransformation, ...]


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Like ``optax.chain``, but a learning-rate rule controls the step size wherever it stands.

    In a plain ``optax.chain(greedy_lr(), optax.adamw(1e-3))`` the rule would multiply the *gradients*,
    and Adam divides a constant factor out again. Here the rules are applied last, in the order given,
    so this chain is exactly ``optax.chain(optax.adamw(1e-3), greedy_lr())``, state included. Chains made
    by this function may be nested; a rule that stands inside another wrapper (``optax.masked``, a plain
    ``optax.chain``, ...) is not seen: :func:`greedylr_jax.assert_controls_learning_rate` tells.

    Args:
      *transforms: gradient transformations, learning-rate rules among them at any place.

    Returns:
      A ``GradientTransformationExtraArgs``; its state is the tuple of the states in the order of
      application.

    Raises:
      TypeError: if an argument is not a gradient transformation.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> params = jnp.ones(3)
      >>> tx = greedylr_jax.chain(greedylr_jax.greedy_lr(), optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=2.0)
      >>> greedylr_jax.assert_controls_learning_rate(tx, params)
    """
    links: list[optax.GradientTransformation] = []
    for position, transform in enumerate(transforms):
        if not isinstance(transform, optax.GradientTransformation):
            raise TypeError(
                f"argument {position} of chain must be an optax.GradientTransformation, got "
                f"{transform!r}. A schedule goes into the optimizer, as its learning_rate."
            )
        links.extend(transform.links if isinstance(transform, _Chain) else (transform,))
    links.sort(key=lambda link: isinstance(link, ScaleByRule))  # stable: rules last
    result = _Chain(*optax.chain(*links)) if links else _Chain(*optax.identity())
    result.links = tuple(links)
    return result


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
        state = _observe(rule, state, value, has_value, every, axis_name, extra_args)
        return scale_updates(updates, state.rule.scale), state

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
        carried = _init_rule(self.rule, self.init_value)
        return RuleScheduleState(
            init_value=jnp.array(self.init_value, carried.value_sum.dtype), carried=carried
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
        carried = _observe(self.rule, state.carried, value, has_value, self.every, self.axis_name, extra_args)
        return state._replace(carried=carried)

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
        return state.carried.rule.scale


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


def bind_extra_args(tx: optax.GradientTransformation, **extra_args: Any) -> optax.GradientTransformation:
    """The same transformation, whose ``update`` gets these extra arguments if it takes any.

    The type does not tell: ``optax.MultiSteps`` takes them without being of a type that says so.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    takes_them = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    update = functools.partial(tx.update, **extra_args) if takes_them else tx.update
    return optax.GradientTransformation(tx.init, update)


def as_direction(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose results point along the gradient and not against it.

    Rules that keep the rate themselves need a direction without one, such as ``optax.scale_by_adam()``. An
    optimizer built with rate 1, such as ``optax.adam(1.0)``, is the negative of that and is turned around
    here; which of the two it is shows in its answer to a gradient of 1.
    """
    inner = optax.with_extra_args_support(inner)
    answer = _answer_to_one(inner)
    if answer is None or answer >= 0:
        return inner

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        steps, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.negative, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _answer_to_one(inner: optax.GradientTransformationExtraArgs) -> float | None:
    """What comes of a gradient of 1 at the parameter 0; None where that cannot be known."""
    try:
        with jax.ensure_compile_time_eval():
            one, zero = jnp.ones(1), jnp.zeros(1)
            answer, _ = inner.update(one, inner.init(zero), zero)
            return None if _checks.is_traced(answer) else float(answer[0])
    except Exception:  # a transformation for parameters of a certain structure, or with other arguments
        return None


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


def _init_rule(rule: Rule, initial: ArrayLike) -> RuleState:
    dtype = default_float_dtype()
    return RuleState(
        rule=rule.init(jnp.array(initial, dtype)),
        value_sum=jnp.zeros((), dtype),
        value_count=jnp.zeros((), jnp.int32),
    )


def _observe(
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
    loss = average(check_loss(rule.name, value).astype(state.value_sum.dtype), axis_name)
    observations = {
        name: None
        if extra_args.get(name) is None
        else average(check_loss(rule.name, extra_args[name], name).astype(loss.dtype), axis_name)
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
    return select(decides, decided, select(observed, collected, state))


def where(condition: jax.Array, on_true: ArrayLike, on_false: ArrayLike) -> jax.Array:
    """``jnp.where`` for two arrays of one shape, or an array and a number.

    Each ``jnp.where`` is a function of its own in the program. The dozen that a rule has were a quarter to a
    third of what it took to trace and lower.
    """
    shape, dtype = jnp.shape(on_true) or jnp.shape(on_false), jnp.result_type(on_true, on_false)

    def array(value: ArrayLike) -> ArrayLike:
        return value.astype(dtype) if isinstance(value, jax.Array) else np.full(shape, value, dtype)

    return jax.lax.select(condition, array(on_true), array(on_false))


def select(condition: jax.Array, on_true: RuleStateT, on_false: RuleStateT) -> RuleStateT:
    """:func:`where` for two states of the same structure."""
    return jax.tree.map(functools.partial(where, condition), on_true, on_false)


def average(losses: RuleStateT, axis_name: Hashable | None) -> RuleStateT:
    """The mean over the devices of a mapped axis; what is given where there is none."""
    return losses if axis_name is None else jax.lax.pmean(losses, axis_name)


def read_loss(
    rule_name: str,
    value: ArrayLike | None,
    has_value: ArrayLike | None,
    dtype: jnp.dtype,
    axis_name: Hashable | None,
) -> tuple[jax.Array, jax.Array]:
    """The loss of a step, averaged over devices, and whether there is one: if not, the loss is any number."""
    if value is None and _checks.is_known_false(has_value):
        value = 0.0
    loss = average(check_loss(rule_name, value).astype(dtype), axis_name)
    return loss, jnp.asarray(True if has_value is None else has_value, bool)


def check_loss(rule_name: str, value: ArrayLike | None, name: str = "value") -> jax.Array:
    """Returns the loss as a real scalar array, or raises an error that shows the right call."""
    right_call = f"tx.update(grads, opt_state, params, {name}=loss)"
    if value is None:
        raise TypeError(
            f"{rule_name} needs the loss of this step: call {right_call}, where loss is the scalar "
            "that you differentiate (jax.value_and_grad returns it). For a step without a new loss "
            "pass has_value=False."
        )
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got {value!r}."
        ) from error
    if array.shape != ():
        raise ValueError(
            f"{rule_name}: {name} must be a scalar loss, got shape {array.shape}. Reduce it first: "
            f"{right_call.replace('loss', 'jnp.mean(losses)')}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got dtype {array.dtype}."
        )
    return array
