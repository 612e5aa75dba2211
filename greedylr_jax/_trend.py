"""A rule that asks whether the loss has changed more than its noise explains.

Every ``window`` losses the mean of all since a moment, the *block*, is compared with that of a stretch
before it, the *reference*, by Welch's statistic

    z = (mean - reference mean) / sqrt(variance / n + reference variance / reference n).

Significantly lower: the rate works, and is raised. Significantly higher: it is cut. Neither: the rate
drifts up a little, so that one that is far too low, whose losses are all noise, does not stay so; and the
block grows by another window, so that a change that is lost in the noise of twenty losses shows in forty, or
eighty. After a decision the last window is the reference; without one, a block twice as long as its reference
takes its place.

A raise after which the loss falls about as fast as before it has paid, as the loss falls ever more slowly
otherwise: the next one is a leap. One that has not paid does not make the next ones smaller: with that rule
perceptrons came out as before, and a vision transformer with SGD four points lower. With each turn from
rising to falling all moves become smaller, as a rate that was too high once will be so again.

There is no paper; the test is B. L. Welch, "The Generalization of 'Student's' Problem when Several Different
Population Variances are Involved", 1947.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _rule
from greedylr_jax._window import LONGEST, Window, empty_window, mean_variance, observe

_LEAST_BOLDNESS = 0.125
_PAID = 0.7  # least speed after a raise, over that before, of one that has paid


# Verdicts, in an order in which one comparison tells what is kept.
WAITS = 0  # the window is not full
GOES_ON = 1  # nothing is significant: the block grows
DOUBLES = 2  # nor is anything in a block twice as long as the reference, whose place it takes
BEGINS = 3  # there is nothing to compare with: the window is the reference
RAISES = 4
LEAPS = 5
CUTS = 6
DIVERGED = 7  # the loss is not finite


class TrendState(NamedTuple):
    """State of the trend rule."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    boldness: jax.Array  # shape=(), dtype=float; exponent of all factors, 1 at the start
    rose: jax.Array  # shape=(), dtype=bool; whether the last move was up
    verdict: jax.Array  # shape=(), dtype=int32; what the last loss led to, one of the constants above
    window: Window  # the losses since the last test; after a test until the next loss, those that led to it
    block: Window  # the losses since the reference; the same
    reference: Window  # what the block is compared with
    speed: jax.Array  # shape=(), dtype=float; fall of the loss a step before the last raise; 0 after a cut


class TrendSettings(NamedTuple):
    """Hyperparameters of the rule; all may be traced. Those with a default are :func:`trend_lr`'s."""

    low: ArrayLike
    high: ArrayLike
    window: ArrayLike = 20
    raise_factor: ArrayLike = 1.3
    leap_factor: ArrayLike = 2.0
    cut_factor: ArrayLike = 0.49
    drift: ArrayLike = 1.1
    fade: ArrayLike = 0.5
    significance: ArrayLike = 2.0


def trend_lr(
    *,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    leap_factor: ArrayLike = 2.0,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    fade: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    min_scale: ArrayLike = 1e-4,
    max_scale: ArrayLike = 5.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """The trend rule as a gradient transformation, to stand after the optimizer.

    For a training whose initial rate may be too low by any factor: it rises by ``raise_factor``,
    ``leap_factor`` or ``drift`` every ``window`` losses. It is what :func:`greedylr_jax.auto_lr` does after
    its search.

    Args:
      window: losses between two tests, an integer in [2, 2**24]; may be traced, as may all numbers here.
      raise_factor: of the rate after a significant improvement, >= 1.
      leap_factor: the same, where the raise before has paid, >= 1.
      cut_factor: of the rate after a significant worsening or a loss that is not finite, in (0, 1).
      drift: of the rate where nothing is significant, >= 1; 1 leaves it as it is. Where the loss is noisy it
        raises even a rate that is too high, until that shows.
      fade: in [0, 1]: what a cut after a rise multiplies the exponent of all factors by, down to 1/8; 1 keeps
        them as they are. A loss that is not finite is always cut by ``cut_factor``.
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
    settings = _check(low, high, window, raise_factor, leap_factor, cut_factor, drift, fade, significance)
    return _rule.scale_by_rule(trend_rule(settings), every=every, axis_name=axis_name)


def trend_lr_schedule(
    init_value: ArrayLike,
    *,
    min_value: ArrayLike,
    max_value: ArrayLike,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    leap_factor: ArrayLike = 2.0,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    fade: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """The trend rule as an Optax stateful schedule, which is the learning rate itself.

    Args:
      init_value: the initial learning rate, > 0.
      min_value: lower bound of the rate, in (0, ``init_value``].
      max_value: upper bound of the rate, >= ``init_value``.
      window: as in :func:`trend_lr`.
      raise_factor: as in :func:`trend_lr`.
      leap_factor: as in :func:`trend_lr`.
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
    settings = _check(low, high, window, raise_factor, leap_factor, cut_factor, drift, fade, significance)
    return _rule.schedule_by_rule(trend_rule(settings), first, every=every, axis_name=axis_name)


def _check(
    low: ArrayLike,
    high: ArrayLike,
    window: ArrayLike,
    raise_factor: ArrayLike,
    leap_factor: ArrayLike,
    cut_factor: ArrayLike,
    drift: ArrayLike,
    fade: ArrayLike,
    significance: ArrayLike,
) -> TrendSettings:
    return TrendSettings(
        low=low,
        high=high,
        window=_checks.check_integer("window", window, low=2, high=LONGEST),
        raise_factor=_checks.check_real("raise_factor", raise_factor, low=1.0, high_open=True),
        leap_factor=_checks.check_real("leap_factor", leap_factor, low=1.0, high_open=True),
        cut_factor=_checks.check_real(
            "cut_factor", cut_factor, low=0.0, high=1.0, low_open=True, high_open=True
        ),
        drift=_checks.check_real("drift", drift, low=1.0, high_open=True),
        fade=_checks.check_real("fade", fade, low=0.0, high=1.0),
        significance=_checks.check_real("significance", significance, low=0.0, high_open=True),
    )


def trend_rule(settings: TrendSettings) -> _rule.Rule:
    """The rule itself, with settings that are in range."""

    def init(scale: jax.Array) -> TrendState:
        return TrendState(
            scale=scale,
            boldness=jnp.ones_like(scale),
            rose=jnp.zeros((), bool),
            verdict=jnp.full((), WAITS, jnp.int32),
            window=empty_window(),
            block=empty_window(),
            reference=empty_window(),
            speed=jnp.zeros_like(scale),
        )

    def update(state: TrendState, value: jax.Array) -> TrendState:
        numbers = TrendSettings(*(jnp.asarray(number, value.dtype) for number in settings))
        window = observe(_numerics.select(state.verdict > WAITS, empty_window(), state.window), value)
        block = observe(_numerics.select(state.verdict > GOES_ON, empty_window(), state.block), value)
        verdict, speed = _judge(state, window, block, value, numbers)
        factor = _factor(verdict, numbers)
        moved = state.scale * factor ** _numerics.where(verdict == DIVERGED, 1, state.boldness)
        faded = jnp.maximum(state.boldness * numbers.fade, _LEAST_BOLDNESS)
        reference = _numerics.select(verdict == DOUBLES, block, state.reference)
        reference = _numerics.select(verdict >= BEGINS, window, reference)
        return TrendState(
            scale=jnp.clip(moved, numbers.low, numbers.high),
            boldness=_numerics.where((verdict >= CUTS) & state.rose, faded, state.boldness),
            rose=_numerics.where(factor == 1, state.rose, factor > 1),
            verdict=verdict,
            window=window,
            block=block,
            # What came before a divergence is no measure of what comes after.
            reference=_numerics.select(verdict == DIVERGED, empty_window(), reference),
            speed=speed,
        )

    return _rule.Rule(init, update, name="trend_lr")


def _judge(
    state: TrendState, window: Window, block: Window, value: jax.Array, numbers: TrendSettings
) -> tuple[jax.Array, jax.Array]:
    """What a loss, the last one of a window and of a block, leads to; and the state's next ``speed``."""
    reference = state.reference
    rise = block.mean - reference.mean
    bound = numbers.significance * jnp.sqrt(mean_variance(block) + mean_variance(reference))
    # From the middle of one stretch to that of the other.
    distance = 0.5 * (block.steps + reference.steps)
    has_paid = (state.speed > 0) & (-rise >= _PAID * state.speed * distance)

    verdict = _numerics.where(block.steps >= 2 * reference.steps, DOUBLES, GOES_ON)
    verdict = _numerics.where(rise < -bound, _numerics.where(has_paid, LEAPS, RAISES), verdict)
    verdict = _numerics.where(rise > bound, CUTS, verdict)
    verdict = _numerics.where(reference.steps > 0, verdict, BEGINS)
    verdict = _numerics.where(window.steps >= numbers.window, verdict, WAITS)
    verdict = _numerics.where(jnp.isfinite(value), verdict, DIVERGED).astype(jnp.int32)
    speed = _numerics.where((verdict == RAISES) | (verdict == LEAPS), -rise / distance, state.speed)
    return verdict, _numerics.where(verdict >= CUTS, 0, speed)


def _factor(verdict: jax.Array, numbers: TrendSettings) -> jax.Array:
    """What the scale is multiplied by, before its exponent."""
    factor = _numerics.where((verdict == GOES_ON) | (verdict == DOUBLES), numbers.drift, 1)
    factor = _numerics.where(verdict == RAISES, numbers.raise_factor, factor)
    factor = _numerics.where(verdict == LEAPS, numbers.leap_factor, factor)
    return _numerics.where(verdict >= CUTS, numbers.cut_factor, factor)
