"""A rule that needs no initial rate: it looks for one, goes back to the start, and trains.

In the first ``ramp_steps`` steps the rate rises geometrically over ten decades, and the losses are kept. Once
the loss has risen above where it started, by more than its noise, or the ramp is over, the training goes back
to the *initial parameters and a fresh optimizer*, and starts again at a tenth of the rate at which the
smoothed loss was least. From there on the trend rule acts (:mod:`greedylr_jax.trend`), never above that rate:
what the ramp saw is the greatest at which the network still learns. In the last fifth of the training the
rate falls to zero. Where the ramp has walked to a flatter place than the start, that rate may be too high
here: if twenty losses in a row are above where the loss started, or not finite, the training goes back again,
to a tenth of the rate.

There is no paper. The ramp is the range test of L. N. Smith, "Cyclical Learning Rates for Training Neural
Networks", 2017, inside the training.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, base, rollback, trend

RAMP, TRAIN, RETURN = 0, 1, 2  # phases; on the way back it counts on from RETURN
_LOWEST, _HIGHEST = -6.0, 4.0  # decades of the ramp around the given rate
_BACKOFF = 0.1  # the rate to start with over that of the least loss
_SMOOTHED = 7  # losses of the ramp, whose means are compared
_RECENT = 3  # losses whose mean tells that the loss has risen
_QUIET = 10  # losses of the ramp that tell how noisy they are
_ERRORS = 6.0  # standard errors that are no noise
_BAD = 20  # losses in a row above the limit that the training does not recover from
_RAMP_STEPS, _RAMP_SHARE, _LEAST_RAMP = 150, 0.15, 30
_ANNEALED = 0.2  # of the steps


class AutoState(NamedTuple):
    """State of :func:`auto_lr`."""

    rate: base.RateState
    step: jax.Array  # shape=(), dtype=int32; losses seen
    phase: jax.Array  # shape=(), dtype=int32; RAMP, TRAIN, or RETURN and more
    losses: jax.Array  # shape=(ramp_steps + 1,), dtype=float; of the ramp
    limit: jax.Array  # shape=(), dtype=float; what means of losses must not exceed; infinite while not known
    found: jax.Array  # shape=(), dtype=float; the rate that the ramp led to, less after further returns
    num_bad: jax.Array  # shape=(), dtype=int32; losses in a row that are above the limit, after the ramp
    num_returns: jax.Array  # shape=(), dtype=int32
    trend: trend.TrendState
    start: optax.Params  # the initial parameters
    inner_state: optax.OptState


def auto_lr(
    inner: optax.GradientTransformation,
    learning_rate: ArrayLike = 1e-3,
    *,
    total_steps: ArrayLike | None = None,
    ramp_steps: int | None = None,
    axis_name: Hashable | None = None,
) -> base.GradientTransformationExtraLoss:
    """An optimizer that finds its learning rate itself, and keeps looking after it.

    Call ``update`` with the loss of the step: ``tx.update(grads, state, params, value=loss)``.

    Args:
      inner: a direction without a rate (``optax.scale_by_adam()``, ``optax.trace(0.9)``, ...), or an
        optimizer built with rate 1 (``optax.adamw(1.0)``).
      learning_rate: > 0; the ramp goes from a millionth of it to ten thousand times of it. May be traced.
      total_steps: length of the training, the ramp included, an integer >= 1: over the last fifth of it the
        rate falls linearly to zero. None: it does not fall by itself. May be traced.
      ramp_steps: longest ramp, an integer >= 30; static. Default: 150, or 15% of ``total_steps`` where that
        is less.
      axis_name: the mapped axis, or axes, over which losses are averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params`` and ``value``. Its
      state has one copy of the parameters. The ramp's last update leads back to the initial parameters; where
      one addition cannot reach them to the last bit, further ones do, whose gradients are not used. Keep what
      changes updates (weight decay, clipping) in ``inner`` and not behind it. Parameters must all be seen:
      not inside ``optax.masked`` or ``optax.partition``. What is not a parameter, such as the statistics of a
      batch normalisation, does not go back.

    Raises:
      ValueError: if a number is out of its range. Its ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params`` or ``value`` is missing, or the value is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> loss_fn = lambda params: jnp.sum((params - 1) ** 2)
      >>> tx = greedylr_jax.auto_lr(optax.identity(), total_steps=300)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     return (optax.apply_updates(params, updates), state), loss
      >>> params = jnp.zeros(3)
      >>> (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=300)
      >>> bool(losses[-1] < 1e-6)
      True

    Source: this project; the ramp is Smith's range test (2017), inside the training.
    """
    centre = _checks.check_real("learning_rate", learning_rate, low=0.0, low_open=True, high_open=True)
    if total_steps is not None:
        total_steps = _checks.check_integer("total_steps", total_steps, low=1)
    ramp_steps = _ramp_steps(ramp_steps, total_steps)
    inner = base.as_direction(inner)
    rule = trend.trend_rule(trend.TrendSettings(low=1e-4, high=1 / _BACKOFF))
    ratio = 10.0 ** ((_HIGHEST - _LOWEST) / (ramp_steps - 1))

    def ramp_rate(step: jax.Array) -> jax.Array:
        """The rate of a step of the ramp."""
        first = jnp.asarray(centre, base.default_float_dtype()) * 10.0**_LOWEST
        return first * jnp.asarray(ratio, first.dtype) ** step.astype(first.dtype)

    def init_fn(params: optax.Params) -> AutoState:
        dtype = base.default_float_dtype()
        return AutoState(
            rate=base.RateState(ramp_rate(jnp.zeros((), jnp.int32))),
            step=jnp.zeros((), jnp.int32),
            phase=jnp.full((), RAMP, jnp.int32),
            losses=jnp.zeros(ramp_steps + 1, dtype),
            limit=jnp.full((), jnp.inf, dtype),
            num_bad=jnp.zeros((), jnp.int32),
            num_returns=jnp.zeros((), jnp.int32),
            found=jnp.array(centre, dtype),
            trend=rule.init(jnp.ones((), dtype)),
            start=jax.tree.map(jnp.array, params),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: AutoState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AutoState]:
        if params is None:
            raise TypeError(
                "auto_lr needs the parameters, to go back to them: call "
                "tx.update(grads, state, params, value=loss)."
            )
        if value is None and _checks.is_known_false(has_value):
            value = 0.0  # never looked at
        loss = base.average(base.check_loss("auto_lr", value).astype(state.losses.dtype), axis_name)
        extra_args |= {"value": value, "has_value": has_value}
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)

        observed = jnp.asarray(True if has_value is None else has_value, bool)
        ramps, trains = state.phase == RAMP, state.phase == TRAIN
        place = jnp.minimum(state.step, ramp_steps)
        losses = state.losses.at[place].set(jnp.where(ramps & observed, loss, state.losses[place]))
        limit = jnp.where(ramps & (state.step == _QUIET), _limit(losses), state.limit)
        has_risen, best = jax.lax.cond(
            ramps & observed,
            lambda: (_recent(losses, state.step) > limit, _best_step(losses, state.step)),
            lambda: (jnp.asarray(False), jnp.zeros((), jnp.int32)),
        )
        ends = ramps & observed & (has_risen | (state.step >= ramp_steps))
        # A loss may be that high once, and the next ones low again.
        is_bad = observed & ~(loss <= limit)
        num_bad = jnp.where(is_bad, state.num_bad + 1, jnp.where(observed, 0, state.num_bad))
        again = trains & (num_bad >= _BAD)
        trend_state = base.select(trains & observed, rule.update(state.trend, loss), state.trend)
        trend_state = base.select(again, rule.init(jnp.ones_like(state.found)), trend_state)
        found = jnp.where(again, _BACKOFF * state.found, state.found)
        found = jnp.where(ends, _BACKOFF * ramp_rate(best), found)
        rate = jnp.where(
            ramps & ~ends,
            ramp_rate(state.step),
            found * trend_state.scale * _anneal(state.step, total_steps).astype(found.dtype),
        )
        rate = jnp.where(observed, rate, state.rate.learning_rate)
        begins = ends | again
        returns = begins | (state.phase >= RETURN)
        steps = base.scale_updates(direction, -rate)

        def protect(_: jax.Array, carry: Any) -> Any:
            steps, inner_state = carry
            guarded = rollback.where_finite(jnp.asarray(True), steps, params)
            back = rollback.difference(state.start, params)
            # The optimizer, too, is as it was at the start.
            return base.select(returns, (back, inner.init(state.start)), (guarded, inner_state))

        # A loop of one turn or none: where all goes well nothing of the parameters' size is touched.
        in_danger = ramps | returns | is_bad
        steps, inner_state = jax.lax.fori_loop(0, in_danger.astype(jnp.int32), protect, (steps, inner_state))
        last_return = RETURN + rollback.SETTLING_STEPS - 2
        after = jnp.where(state.phase == last_return, TRAIN, state.phase + 1)
        phase = jnp.where(begins, RETURN, jnp.where(state.phase >= RETURN, after, state.phase))
        return steps, AutoState(
            rate=base.RateState(rate),
            step=jnp.where(observed, optax.safe_increment(state.step), state.step),
            phase=phase.astype(jnp.int32),
            losses=losses,
            limit=limit,
            found=found,
            num_bad=jnp.where(trains & ~again, num_bad, 0),
            num_returns=state.num_returns + begins.astype(jnp.int32),
            trend=trend_state,
            start=state.start,
            inner_state=inner_state,
        )

    return base.GradientTransformationExtraLoss(init_fn, update_fn)


def _ramp_steps(ramp_steps: int | None, total_steps: ArrayLike | None) -> int:
    if ramp_steps is not None:
        return _checks.check_static_integer("ramp_steps", ramp_steps, low=_LEAST_RAMP)
    if total_steps is None or _checks.is_traced(total_steps):
        return _RAMP_STEPS
    return max(_LEAST_RAMP, min(_RAMP_STEPS, int(_RAMP_SHARE * total_steps)))


def _limit(losses: jax.Array) -> jax.Array:
    """What a mean of three losses exceeds if they have risen above the ramp's first by more than noise."""
    first = losses[:_QUIET]
    finite = jnp.isfinite(first)
    spread = jnp.std(first, ddof=1, where=finite) / jnp.sqrt(jnp.asarray(_RECENT, losses.dtype))
    limit = jnp.mean(first, where=finite) + _ERRORS * spread
    return jnp.where(jnp.sum(finite) > 1, limit, jnp.inf)


def _recent(losses: jax.Array, last: jax.Array) -> jax.Array:
    """The mean of the last three losses, of those that are finite; infinite if none is."""
    recent = jax.lax.dynamic_slice(losses, (jnp.maximum(last - _RECENT + 1, 0),), (_RECENT,))
    finite = jnp.isfinite(recent)
    return jnp.where(jnp.any(finite), jnp.mean(recent, where=finite), jnp.inf)


def _best_step(losses: jax.Array, last: jax.Array) -> jax.Array:
    """The step of the ramp after which the smoothed loss was least."""
    place = jnp.arange(len(losses))
    seen = (place <= last) & jnp.isfinite(losses)
    # Means over what was seen of the neighbours; a loss is that before its step.
    near = jnp.abs(place[:, None] - place) <= _SMOOTHED // 2
    weights = (near & seen).astype(losses.dtype)
    means = weights @ jnp.where(seen, losses, 0) / jnp.maximum(jnp.sum(weights, axis=1), 1)
    return jnp.maximum(jnp.argmin(jnp.where(seen, means, jnp.inf)) - 1, 0).astype(jnp.int32)


def _anneal(step: jax.Array, total_steps: ArrayLike | None) -> jax.Array:
    """1, and over the last steps linearly to zero."""
    if total_steps is None:
        return jnp.ones(())
    total = jnp.asarray(total_steps, base.default_float_dtype())
    return jnp.clip((total - step) / (_ANNEALED * total), 0, 1)
