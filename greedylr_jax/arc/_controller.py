"""ARC: a small network that looks at the last losses, and raises, keeps or lowers the rate once a cycle.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Sections 3.1 and
3.4. Departures:

* A cycle is a number of steps and not of epochs; an epoch is nothing that a training step knows of.
* The rate in the features is the rule's own factor: a schedule that the optimizer follows besides is not
  seen.
* A loss that is not finite stands for the greatest finite one seen, and the rate is lowered at the end of
  its cycle, whatever the network says: it was trained on losses that are.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from greedylr_jax import _checks, _rule
from greedylr_jax.arc._features import MAX_CYCLES, FeatureStream, History
from greedylr_jax.arc._network import Weights, action_logits, check_weights
from greedylr_jax.arc._weights import load_weights

MULTIPLIERS = (1.618, 1.0, 0.618)  # of raising, keeping and lowering (Section 3.1)


class ArcState(NamedTuple):
    """State of the ARC rule."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    step: jax.Array  # shape=(), dtype=int32; losses seen in the current cycle
    cycles: jax.Array  # shape=(), dtype=int32; finished cycles that are remembered, at most 2
    action: jax.Array  # shape=(), dtype=int32; the last decision, an index into ACTIONS; 1 before the first
    worst_value: jax.Array  # shape=(), dtype=float32; greatest finite loss so far
    has_diverged: jax.Array  # shape=(), dtype=bool; a loss of this cycle was not finite
    history: History


def arc(
    weights: Weights | None = None,
    *,
    steps_per_cycle: int,
    validation: bool = True,
    max_validations: int = 10,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """ARC as a gradient transformation, to stand after the optimizer.

    For a training whose right rate is not known to within two orders of magnitude, and that takes at least
    some ten cycles: the rate changes by a factor of 1.618 a cycle at most.

    ``update`` needs ``value=loss``, and takes ``validation_value=``, a validation loss, at the steps that
    bring one; NaN says that a step brings none, so that a jitted loop may pass one always.

    Args:
      weights: of the network, by name, see :func:`greedylr_jax.arc.load_weights` and
        :func:`greedylr_jax.arc.load_keras_weights`; None: those that come with the package.
      steps_per_cycle: losses between two decisions, >= 2; static. The paper takes three epochs of a training
        of thirty.
      validation: whether ``validation_value`` is looked at; if not, the network gets zeros, as in half of its
        training.
      max_validations: validation losses kept of a cycle, >= 1; static. Of more the last are kept.
      every: losses whose mean is one observation, >= 1; ``steps_per_cycle`` counts observations, and a
        validation loss is seen at a step that completes one.
      axis_name: a mapped axis over which losses are averaged first.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if an argument is out of range, or the weights do not fit.

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
    rule = _make_rule(weights, steps_per_cycle, validation, max_validations)
    return _rule.scale_by_rule(rule, every=every, axis_name=axis_name)


def arc_schedule(
    init_value: ArrayLike,
    weights: Weights | None = None,
    *,
    steps_per_cycle: int,
    validation: bool = True,
    max_validations: int = 10,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """ARC as an Optax stateful schedule, which is the learning rate itself.

    Args:
      init_value: the initial learning rate, > 0.
      weights: as in :func:`arc`.
      steps_per_cycle: as in :func:`arc`.
      validation: as in :func:`arc`.
      max_validations: as in :func:`arc`.
      every: as in :func:`arc`.
      axis_name: as in :func:`arc`.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: as :func:`arc`, or if ``init_value`` is not positive.

    Examples:
      >>> schedule = arc_schedule(0.1, steps_per_cycle=100)
      >>> state = schedule.update(schedule.init(), value=2.0)
      >>> print(schedule(state))
      0.1

    Source: Sections 3.1 and 3.4.
    """
    rule = _make_rule(weights, steps_per_cycle, validation, max_validations)
    return _rule.schedule_by_rule(rule, init_value, every=every, axis_name=axis_name)


def _make_rule(
    weights: Weights | None, steps_per_cycle: int, validation: bool, max_validations: int
) -> _rule.Rule:
    steps_per_cycle = _checks.check_static_integer("steps_per_cycle", steps_per_cycle, low=2)
    max_validations = _checks.check_static_integer("max_validations", max_validations, low=1)
    weights = load_weights() if weights is None else check_weights(weights)
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

    def decide(state: ArcState) -> ArcState:
        history = state.history._replace(
            rates=state.history.rates.at[-1].set(state.scale.astype(jnp.float32))
        )
        cycles = state.cycles + 1
        logits = action_logits(weights, stream.features(history, cycles))
        action = jnp.where(state.has_diverged, MULTIPLIERS.index(min(MULTIPLIERS)), jnp.argmax(logits))
        return state._replace(
            scale=jnp.clip(
                state.scale * jnp.asarray(MULTIPLIERS, state.scale.dtype)[action],
                jnp.finfo(state.scale.dtype).tiny,  # neither zero nor infinity can be left again
                jnp.finfo(state.scale.dtype).max,
            ),
            step=jnp.zeros_like(state.step),
            cycles=jnp.minimum(cycles, MAX_CYCLES - 1),
            action=action.astype(jnp.int32),
            has_diverged=jnp.zeros_like(state.has_diverged),
            history=stream.next_cycle(history),
        )

    def keep(state: ArcState) -> ArcState:
        return state

    def update(state: ArcState, value: jax.Array, validation_value: jax.Array | None = None) -> ArcState:
        finite = jnp.isfinite(value)
        loss = value.astype(jnp.float32)
        worst = jnp.where(finite, jnp.maximum(state.worst_value, loss), state.worst_value)
        loss = jnp.where(finite, loss, jnp.where(jnp.isfinite(worst), worst, 0))
        history = stream.add_loss(state.history, state.step, loss)
        if validation and validation_value is not None:
            history = stream.add_validation(history, _finite_or_none(validation_value))
        state = state._replace(
            step=state.step + 1,
            worst_value=worst,
            has_diverged=state.has_diverged | ~finite,
            history=history,
        )
        return jax.lax.cond(state.step == steps_per_cycle, decide, keep, state)

    return _rule.Rule(init, update, "arc", ("validation_value",))


def _finite_or_none(value: jax.Array) -> jax.Array:
    """A validation loss that overflowed says nothing of its size; NaN stands for no loss."""
    return jnp.where(jnp.isfinite(value), value, jnp.nan)
