"""ARC: a small network observes the recent losses and raises, keeps or lowers the rate once per cycle.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Sections 3.1 and
3.4. Departures:

* A cycle is a number of steps instead of epochs, since a training step does not know the length of an epoch.
* The learning rate in the features is the rule's own scale, without any schedule of the optimizer.
* A loss that is not finite is replaced by the largest finite loss so far, and the rate is lowered at the end
  of its cycle whatever the network decides: it was trained on finite losses only.
* The rate stays within bounds, if they are given.
"""

import math
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from greedylr_jax import _checks, _rule
from greedylr_jax.arc._features import MAX_CYCLES, FeatureStream, History
from greedylr_jax.arc._network import Weights, action_logits, check_weights
from greedylr_jax.arc._weights import load_weights

MULTIPLIERS = (1.618, 1.0, 0.618)  # for raise, keep and lower (Section 3.1)


class ArcState(NamedTuple):
    """State of the ARC rule."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    step: jax.Array  # shape=(), dtype=int32; losses seen in the current cycle
    cycles: jax.Array  # shape=(), dtype=int32; finished cycles in the history, at most 2
    action: jax.Array  # shape=(), dtype=int32; the last decision, an index into ACTIONS; 1 before the first
    worst_value: jax.Array  # shape=(), dtype=float32; largest finite loss so far
    has_diverged: jax.Array  # shape=(), dtype=bool; a loss of this cycle was not finite
    history: History


def arc(
    weights: Weights | None = None,
    *,
    steps_per_cycle: int,
    validation: bool = True,
    max_validations: int = 10,
    min_scale: ArrayLike = 0.0,
    max_scale: ArrayLike = math.inf,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """ARC as a gradient transformation; place it after the optimizer.

    Use it if the right learning rate is known only to within two orders of magnitude and training has at
    least ten cycles: the rate changes by at most a factor of 1.618 per cycle.

    ``update`` requires ``value=loss`` and accepts ``validation_value=``, a validation loss, at the steps that
    have one; NaN stands for no validation loss, so a jitted loop can always pass it.

    Args:
      weights: weights of the network by name, see :func:`greedylr_jax.arc.load_weights` and
        :func:`greedylr_jax.arc.load_keras_weights`; None: the weights in the package.
      steps_per_cycle: number of losses between two decisions, an integer >= 2; static. The paper uses three
        of thirty epochs.
      validation: whether to use ``validation_value``; if False, the network gets zeros, as in half of its
        training samples.
      max_validations: number of validation losses per cycle that are used, an integer >= 1; static. Of more
        the last ones are used.
      min_scale: lowest scale, in [0, 1]; may be traced. Default 0: any positive number.
      max_scale: highest scale, >= 1; may be traced. Default infinity: any finite number.
      every: number of losses whose mean is one observation, an integer >= 1; ``steps_per_cycle`` counts
        observations, and a validation loss is used at a step that completes one.
      axis_name: mapped axis, or axes, over which losses are averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`.

    Raises:
      ValueError: if an argument is out of its range, or the weights do not fit the network.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.sgd(0.1), arc(steps_per_cycle=5))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> step = jax.jit(lambda g, s, loss: tx.update(g, s, value=loss, validation_value=loss))
      >>> for loss in (5.0, 4.0, 3.0, 2.0, 1.0):
      ...     updates, state = step(params, state, loss)
      >>> round(float(greedylr_jax.get_scale(state)), 3) in (0.618, 1.0, 1.618)
      True

    Source: Sections 3.1 and 3.4.
    """
    bounds = _check_bounds("min_scale", min_scale, "max_scale", max_scale, "the initial scale", 1.0)
    rule = _make_rule(weights, steps_per_cycle, validation, max_validations, bounds)
    return _rule.scale_by_rule(rule, every=every, axis_name=axis_name)


def arc_schedule(
    init_value: ArrayLike,
    weights: Weights | None = None,
    *,
    steps_per_cycle: int,
    validation: bool = True,
    max_validations: int = 10,
    min_learning_rate: ArrayLike = 0.0,
    max_learning_rate: ArrayLike = math.inf,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """ARC as an Optax stateful schedule, whose value is the learning rate.

    Args:
      init_value: the initial learning rate, > 0.
      weights, steps_per_cycle, validation, max_validations, every, axis_name: as in :func:`arc`.
      min_learning_rate: lowest learning rate, in [0, init_value]; may be traced. Default 0: any positive
        number.
      max_learning_rate: highest learning rate, >= init_value; may be traced. Default infinity: any finite
        number.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: as :func:`arc`, or if ``init_value`` is not positive or not within its bounds.

    Examples:
      >>> schedule = arc_schedule(0.1, steps_per_cycle=100)
      >>> state = schedule.update(schedule.init(), value=2.0)
      >>> print(schedule(state))
      0.1

    Source: Sections 3.1 and 3.4.
    """
    bounds = _check_bounds(
        "min_learning_rate",
        min_learning_rate,
        "max_learning_rate",
        max_learning_rate,
        "init_value",
        init_value,
    )
    rule = _make_rule(weights, steps_per_cycle, validation, max_validations, bounds)
    return _rule.schedule_by_rule(rule, init_value, every=every, axis_name=axis_name)


class _Bounds(NamedTuple):
    """Bounds of the scale, checked."""

    low: float | jax.Array
    high: float | jax.Array

    def clip(self, scale: jax.Array) -> jax.Array:
        # A scale of zero or infinity would stay there forever.
        limits = jnp.finfo(scale.dtype)
        low = jnp.maximum(jnp.asarray(self.low, scale.dtype), limits.tiny)
        return jnp.clip(scale, low, jnp.minimum(jnp.asarray(self.high, scale.dtype), limits.max))


def _check_bounds(
    min_name: str, low: ArrayLike, max_name: str, high: ArrayLike, name: str, initial: ArrayLike
) -> _Bounds:
    lowest = _checks.check_real(min_name, low, low=0.0, high_open=True)
    highest = _checks.check_real(max_name, high, low=0.0, low_open=True)
    _checks.check_initial((min_name, name, max_name), lowest, initial, highest)
    return _Bounds(lowest, highest)


def _make_rule(
    weights: Weights | None, steps_per_cycle: int, validation: bool, max_validations: int, bounds: _Bounds
) -> _rule.Rule:
    steps_per_cycle = _checks.check_static_integer("steps_per_cycle", steps_per_cycle, low=2)
    max_validations = _checks.check_static_integer("max_validations", max_validations, low=1)
    arrays = load_weights() if weights is None else check_weights(weights)
    stream = FeatureStream(steps_per_cycle, max_validations)

    def init(scale: jax.Array) -> ArcState:
        return ArcState(
            scale=scale,
            step=jnp.zeros((), jnp.int32),
            cycles=jnp.zeros((), jnp.int32),
            action=jnp.ones((), jnp.int32),
            worst_value=jnp.full((), -jnp.inf, jnp.float32),
            has_diverged=jnp.zeros((), bool),
            history=stream.init(),
        )

    def choose(state: ArcState) -> jax.Array:
        """Which action the network chooses, shape (3,)."""
        rates = state.history.rates.at[state.history.row].set(state.scale.astype(jnp.float32))
        features = stream.features(state.history._replace(rates=rates), state.cycles + 1)
        return jnp.arange(len(MULTIPLIERS)) == jnp.argmax(action_logits(arrays, features))

    def update(state: ArcState, value: jax.Array, validation_value: jax.Array | None = None) -> ArcState:
        finite = jnp.isfinite(value)
        loss = value.astype(jnp.float32)
        worst = jnp.where(finite, jnp.maximum(state.worst_value, loss), state.worst_value)
        loss = jnp.where(finite, loss, jnp.where(jnp.isfinite(worst), worst, 0))
        history = stream.add_loss(state.history, state.step, loss)
        if validation and validation_value is not None:
            history = stream.add_validation(history, _finite_or_none(validation_value))
        state = state._replace(worst_value=worst, history=history)
        # Arrays that a conditional returns are copied at every step, so it returns the choice alone.
        chosen = jax.lax.cond(
            state.step == steps_per_cycle - 1,
            choose,
            lambda _: jnp.zeros(len(MULTIPLIERS), bool),
            state,
        )
        return finish(state, chosen, state.has_diverged | ~finite)

    def finish(state: ArcState, chosen: jax.Array, has_diverged: jax.Array) -> ArcState:
        """The state after a loss; ``chosen`` is all False within a cycle."""
        raises, keeps, lowers = chosen
        is_end = raises | keeps | lowers
        action = jnp.where(lowers | has_diverged, 2, jnp.where(raises, 0, 1))
        scale = bounds.clip(state.scale * jnp.asarray(MULTIPLIERS, state.scale.dtype)[action])
        return state._replace(
            scale=jnp.where(is_end, scale, state.scale),
            step=jnp.where(is_end, 0, state.step + 1),
            cycles=jnp.where(is_end, jnp.minimum(state.cycles + 1, MAX_CYCLES - 1), state.cycles),
            action=jnp.where(is_end, action, state.action).astype(jnp.int32),
            has_diverged=~is_end & has_diverged,
            history=stream.end_cycle(state.history, state.scale, is_end),
        )

    return _rule.Rule(init, update, "arc", ("validation_value",))


def _finite_or_none(value: jax.Array) -> jax.Array:
    """The validation loss, or NaN, which stands for no loss, if it is infinite."""
    return jnp.where(jnp.isfinite(value), value, jnp.nan)
