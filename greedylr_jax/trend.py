"""A rule that asks whether the loss has changed more than its noise explains.

Every ``window`` losses their mean is compared with that of the ``window`` losses before, by Welch's
statistic

    z = (mean - last mean) / sqrt(variance / n + last variance / last n).

Significantly lower: the rate works, and is raised. Significantly higher: it is cut. Neither: no news is good
news, and the rate is raised a little, so that one that is far too low, whose losses are all noise, does not
stay so. This optimism halves with every cut, as a rate that was too high once will be so again.

There is no paper; the test is B. L. Welch, "The Generalization of 'Student's' Problem when Several Different
Population Variances are Involved", 1947.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from greedylr_jax import _checks, base
from greedylr_jax._window import Window, empty_window, mean_variance, observe


class TrendState(NamedTuple):
    """State of the trend rule."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    optimism: jax.Array  # shape=(), dtype=float; exponent of ``drift``, 1 at the start
    window: Window  # the losses since the last decision
    has_last: jax.Array  # shape=(), dtype=bool; whether there is a window before, to compare with
    last_mean: jax.Array  # shape=(), dtype=float; of that window
    last_error: jax.Array  # shape=(), dtype=float; squared standard error of that mean


class TrendSettings(NamedTuple):
    """Hyperparameters of the rule; all may be traced. Those with a default are :func:`trend_lr`'s."""

    low: ArrayLike
    high: ArrayLike
    window: ArrayLike = 20
    raise_factor: ArrayLike = 1.3
    cut_factor: ArrayLike = 0.49
    drift: ArrayLike = 1.1
    fade: ArrayLike = 0.5
    significance: ArrayLike = 2.0


def trend_lr(
    *,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    fade: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    min_scale: ArrayLike = 1e-4,
    max_scale: ArrayLike = 5.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> base.GradientTransformationExtraLoss:
    """The trend rule as a gradient transformation, to stand after the optimizer.

    For a training whose initial rate may be too low by any factor: it rises by ``raise_factor`` or ``drift``
    every ``window`` losses. It is what :func:`greedylr_jax.auto_lr` does after its search.

    Args:
      window: losses between two decisions, an integer >= 2; may be traced, as may all numbers here.
      raise_factor: of the rate after a significant improvement, >= 1.
      cut_factor: of the rate after a significant worsening or a loss that is not finite, in (0, 1).
      drift: of the rate where nothing is significant, >= 1; 1 leaves it as it is.
      fade: in [0, 1]: what a cut multiplies the exponent of ``drift`` by; 1 keeps the optimism for good.
      significance: how many standard errors two means must be apart, >= 0.
      min_scale: lower bound of the multiplier, in (0, 1].
      max_scale: upper bound of the multiplier, >= 1. The rule itself finds out that a rate is too high only
        after the loss has risen, and some networks do not recover from that.
      every: losses whose mean is one observation, >= 1; ``window`` counts observations.
      axis_name: the mapped axis, or axes, over which losses are averaged first.

    Returns:
      A gradient transformation; ``update`` needs ``value=loss``.

    Raises:
      ValueError: if a number is out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.sgd(0.1), greedylr_jax.trend_lr(window=2))
      >>> state = tx.init(jnp.ones(3))
      >>> for loss in (4.0, 3.9, 2.0, 1.9):  # 1.95 is far below 3.95
      ...     updates, state = tx.update(jnp.ones(3), state, value=loss)
      >>> print(greedylr_jax.get_scale(state))
      1.3

    Source: this project; the test of two means is Welch's (1947).
    """
    low = _checks.check_real("min_scale", min_scale, low=0.0, high=1.0, low_open=True)
    high = _checks.check_real("max_scale", max_scale, low=1.0)
    settings = _check(low, high, window, raise_factor, cut_factor, drift, fade, significance)
    return base.scale_by_rule(trend_rule(settings), every=every, axis_name=axis_name)


def trend_lr_schedule(
    init_value: ArrayLike,
    *,
    min_value: ArrayLike,
    max_value: ArrayLike,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    fade: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> base.RuleSchedule:
    """The trend rule as an Optax stateful schedule, which is the learning rate itself.

    Args:
      init_value: the initial learning rate, > 0.
      min_value: lower bound of the rate, in (0, ``init_value``].
      max_value: upper bound of the rate, >= ``init_value``.
      window: as in :func:`trend_lr`.
      raise_factor: as in :func:`trend_lr`.
      cut_factor: as in :func:`trend_lr`.
      drift: as in :func:`trend_lr`.
      fade: as in :func:`trend_lr`.
      significance: as in :func:`trend_lr`.
      every: as in :func:`trend_lr`.
      axis_name: as in :func:`trend_lr`.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: if a number is out of its range.

    Examples:
      >>> schedule = trend_lr_schedule(0.1, min_value=1e-3, max_value=1.0, window=2)
      >>> state = schedule.init()
      >>> for loss in (4.0, 3.9, 5.0, 5.1):
      ...     state = schedule.update(state, value=loss)
      >>> print(schedule(state))
      0.049000002

    Source: as :func:`trend_lr`.
    """
    low = _checks.check_real("min_value", min_value, low=0.0, low_open=True, high_open=True)
    high = _checks.check_real("max_value", max_value, low=0.0, low_open=True)
    first = _checks.check_real("init_value", init_value, low=0.0, low_open=True, high_open=True)
    _checks.check_order("min_value", low, "init_value", first)
    _checks.check_order("init_value", first, "max_value", high)
    settings = _check(low, high, window, raise_factor, cut_factor, drift, fade, significance)
    return base.schedule_by_rule(trend_rule(settings), first, every=every, axis_name=axis_name)


def _check(
    low: ArrayLike,
    high: ArrayLike,
    window: ArrayLike,
    raise_factor: ArrayLike,
    cut_factor: ArrayLike,
    drift: ArrayLike,
    fade: ArrayLike,
    significance: ArrayLike,
) -> TrendSettings:
    return TrendSettings(
        low=low,
        high=high,
        window=_checks.check_integer("window", window, low=2),
        raise_factor=_checks.check_real("raise_factor", raise_factor, low=1.0, high_open=True),
        cut_factor=_checks.check_real(
            "cut_factor", cut_factor, low=0.0, high=1.0, low_open=True, high_open=True
        ),
        drift=_checks.check_real("drift", drift, low=1.0, high_open=True),
        fade=_checks.check_real("fade", fade, low=0.0, high=1.0),
        significance=_checks.check_real("significance", significance, low=0.0, high_open=True),
    )


def trend_rule(settings: TrendSettings) -> base.Rule:
    """The rule itself, with settings that are in range."""

    def init(scale: jax.Array) -> TrendState:
        return TrendState(
            scale=scale,
            optimism=jnp.ones_like(scale),
            window=empty_window(),
            has_last=jnp.zeros((), bool),
            last_mean=jnp.zeros_like(scale),
            last_error=jnp.zeros_like(scale),
        )

    def update(state: TrendState, value: jax.Array) -> TrendState:
        numbers = TrendSettings(*(jnp.asarray(number, value.dtype) for number in settings))
        window = observe(state.window, value)
        error = mean_variance(window)
        is_full = window.steps >= jnp.asarray(settings.window, jnp.int32)
        rise = window.mean - state.last_mean
        bound = numbers.significance * jnp.sqrt(error + state.last_error)
        diverged = ~jnp.isfinite(value)
        compares = is_full & state.has_last
        better, worse = compares & (rise < -bound), (compares & (rise > bound)) | diverged
        factor = jnp.where(compares, numbers.drift**state.optimism, 1)
        factor = jnp.where(better, numbers.raise_factor, factor)
        factor = jnp.where(worse, numbers.cut_factor, factor)
        return TrendState(
            scale=jnp.clip(state.scale * factor, numbers.low, numbers.high),
            optimism=jnp.where(worse, state.optimism * numbers.fade, state.optimism),
            window=base.select(is_full | diverged, empty_window(), window),
            # What came before a divergence is no measure of what comes after.
            has_last=(state.has_last | is_full) & ~diverged,
            last_mean=jnp.where(is_full, window.mean, state.last_mean),
            last_error=jnp.where(is_full, error, state.last_error),
        )

    return base.Rule(init, update, name="trend_lr")
