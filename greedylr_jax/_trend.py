"""The trend rule: raises the learning rate while the loss falls significantly, cuts it when the loss rises.

Every ``window`` losses the mean of the current window, all losses since the last decision, is compared with
that of the baseline window, the losses before, by Welch's statistic

    z = (mean - baseline mean) / sqrt(variance / n + baseline variance / baseline n).

* Significantly lower: the rate is raised, and the last ``window`` losses become the baseline. If the loss
  keeps falling at 70% or more of the speed before the previous increase, ``accelerated_factor`` is used.
* Significantly higher: the rate is cut, and the last ``window`` losses become the baseline.
* Neither: the rate drifts up a little, so that it does not stay far too low where the losses are all noise.
  The current window grows, so that a change that is lost in the noise of 20 losses is detected in 40 or 80.
  Once it is twice as long as the baseline it becomes the baseline.

A cut that follows an increase shows that the rate has exceeded the largest stable one. Each such cut reduces
the step exponent, the power to which all factors are raised, and pauses the increases: for one test after the
first such cut, for twice as many after each further one. Without pauses the rate keeps returning to the
largest stable one, at which the loss makes no progress: on Rosenbrock's function, 10,000 steps of
``optax.sgd(1e-3)`` ended at 0.5; with pauses they end at 3e-6 (without the rule at 3e-5).

A difference of means within the rounding errors of float32 is not significant. Losses more than ten standard
deviations above the mean of the baseline are clipped to that value: an outlier would otherwise increase the
variance of the current window, and later changes would not be significant.

Smaller increases after one that did not speed up the decrease of the loss were tried and rejected: the
accuracy of perceptrons did not change; that of a vision transformer trained with SGD was 4 points lower.

Not from a paper. The test is that of B. L. Welch, "The Generalization of 'Student's' Problem when Several
Different Population Variances are Involved", 1947.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from greedylr_jax import _checks, _deprecated, _numerics, _rule
from greedylr_jax._window import LONGEST, Window, clip_outlier, empty_window, mean_variance, observe

_MIN_STEP_EXPONENT = 0.125
_MIN_CUT_EXPONENT = 0.5
_MAX_PAUSE = 2**20  # tests
_MIN_SPEED_RATIO = 0.7  # of the speeds after and before an increase: from it on the next one is accelerated


# Decisions. They are ordered, so that one comparison selects the windows that are kept.
WAIT = 0  # the window is not full
CONTINUE = 1  # no significant change; the current window grows
RENEW_BASELINE = (
    2  # no significant change; the current window is twice as long as the baseline and replaces it
)
START = 3  # there is no baseline; the window becomes the baseline
RAISE = 4
ACCELERATE = 5
CUT = 6
DIVERGED = 7  # the loss is not finite


class TrendState(NamedTuple):
    """State of the trend rule."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    step_exponent: jax.Array  # shape=(), dtype=float; power to which all factors are raised, initially 1
    rose: jax.Array  # shape=(), dtype=bool; whether the last change of the scale was an increase
    decision: jax.Array  # shape=(), dtype=int32; after the last loss, one of the constants above
    window: Window  # losses since the last test; cleared at the first loss after a test
    current: Window  # losses since the end of the baseline; cleared at the first loss after a decision
    baseline: Window  # losses that the current window is compared with
    speed: jax.Array  # shape=(), dtype=float; decrease per step at the last increase, 0 after a cut
    pause_count: jax.Array  # shape=(), dtype=int32; number of tests left without increases
    next_pause: jax.Array  # shape=(), dtype=int32; length of the next pause, in tests


class TrendSettings(NamedTuple):
    """Arguments of :func:`trend_lr` that define the rule; all may be traced."""

    min_scale: ArrayLike
    max_scale: ArrayLike
    window: ArrayLike = 20
    raise_factor: ArrayLike = 1.3
    accelerated_factor: ArrayLike = 2.0
    cut_factor: ArrayLike = 0.49
    drift: ArrayLike = 1.1
    decay: ArrayLike = 0.5
    significance: ArrayLike = 2.0


@_deprecated.renamed_arguments(leap_factor="accelerated_factor", fade="decay")
def trend_lr(
    *,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    accelerated_factor: ArrayLike = 2.0,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    decay: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    min_scale: ArrayLike = 1e-4,
    max_scale: ArrayLike = 5.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """Multiplies the updates by a scale that follows the trend of the training loss.

    For an initial rate that may be too low by up to a factor of ``max_scale`` (default 5; raise it if less is
    known): while the loss falls, the scale increases by ``raise_factor``, ``accelerated_factor`` or ``drift``
    every ``window`` losses. Put it after the optimizer. All numeric arguments may be traced.

    Args:
      window: number of losses between two tests, an integer in [2, 2**24].
      raise_factor: multiplies the scale after a significant decrease of the loss, >= 1.
      accelerated_factor: the same, if the loss kept its speed after the previous increase, >= 1.
      cut_factor: multiplies the scale after a significant increase of the loss, or a loss that is not finite;
        in (0, 1).
      drift: multiplies the scale if the change is not significant, >= 1; 1 disables it. In noise it increases
        even a rate that is too high, until the loss rises significantly.
      decay: multiplies the step exponent of all factors at each cut that follows an increase, down to 1/8
        (for ``cut_factor``, 1/2); in [0, 1]; 1 disables it. After a loss that is not finite the scale is
        always multiplied by ``cut_factor``.
      significance: standard errors by which two means must differ, >= 0.
      min_scale: minimum scale, in (0, 1].
      max_scale: maximum scale, >= 1. The rule detects a rate that is too high only after the loss has risen,
        and some networks do not recover from that.
      every: number of losses whose mean is one observation, >= 1; ``window`` counts observations.
      axis_name: mapped axis, or axes, over which the loss is averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`: call
      ``update(updates, state, params, value=loss)``.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(optax.sgd(0.1), greedylr_jax.trend_lr(window=2))
      >>> state = tx.init(jnp.ones(3))
      >>> for loss in (4.0, 3.9, 2.0, 1.9):  # means 3.95 and 1.95
      ...     updates, state = tx.update(jnp.ones(3), state, value=loss)
      >>> print(greedylr_jax.get_scale(state))
      1.3

    Source: this project; the test of two means is Welch's (1947).
    """
    settings = TrendSettings(
        min_scale=min_scale,
        max_scale=max_scale,
        window=window,
        raise_factor=raise_factor,
        accelerated_factor=accelerated_factor,
        cut_factor=cut_factor,
        drift=drift,
        decay=decay,
        significance=significance,
    )
    rule = trend_rule(_check(settings, 1.0, names=("min_scale", "the initial scale", "max_scale")))
    return _rule.scale_by_rule(rule, every=every, axis_name=axis_name)


@_deprecated.renamed_arguments(
    min_value="min_learning_rate",
    max_value="max_learning_rate",
    leap_factor="accelerated_factor",
    fade="decay",
)
def trend_lr_schedule(
    init_value: ArrayLike,
    *,
    min_learning_rate: ArrayLike,
    max_learning_rate: ArrayLike,
    window: ArrayLike = 20,
    raise_factor: ArrayLike = 1.3,
    accelerated_factor: ArrayLike = 2.0,
    cut_factor: ArrayLike = 0.49,
    drift: ArrayLike = 1.1,
    decay: ArrayLike = 0.5,
    significance: ArrayLike = 2.0,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """The trend rule as an Optax stateful schedule, in absolute learning rates.

    Args:
      init_value: the initial learning rate, > 0.
      min_learning_rate: minimum, in (0, ``init_value``].
      max_learning_rate: maximum, >= ``init_value``.
      window, raise_factor, accelerated_factor, cut_factor, drift: as in :func:`trend_lr`.
      decay, significance, every, axis_name: as in :func:`trend_lr`.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> from greedylr_jax import trend_lr_schedule
      >>> schedule = trend_lr_schedule(0.1, min_learning_rate=1e-3, max_learning_rate=1.0, window=2)
      >>> state = schedule.init()
      >>> for loss in (4.0, 3.9, 5.0, 5.1):
      ...     state = schedule.update(state, value=loss)
      >>> print(schedule(state))
      0.049000002

    Source: as :func:`trend_lr`.
    """
    settings = TrendSettings(
        min_scale=min_learning_rate,
        max_scale=max_learning_rate,
        window=window,
        raise_factor=raise_factor,
        accelerated_factor=accelerated_factor,
        cut_factor=cut_factor,
        drift=drift,
        decay=decay,
        significance=significance,
    )
    names = ("min_learning_rate", "init_value", "max_learning_rate")
    rule = trend_rule(_check(settings, init_value, names))
    return _rule.schedule_by_rule(rule, init_value, every=every, axis_name=axis_name)


def _check(settings: TrendSettings, initial_scale: ArrayLike, names: tuple[str, str, str]) -> TrendSettings:
    """Checks the settings; ``names`` are the user's for the minimum, the initial scale and the maximum."""
    real = _checks.check_real
    min_name, _, max_name = names
    checked = TrendSettings(
        min_scale=real(min_name, settings.min_scale, low=0.0, low_open=True, high_open=True),
        max_scale=real(max_name, settings.max_scale, low=0.0, low_open=True),
        window=_checks.check_integer("window", settings.window, low=2, high=LONGEST),
        raise_factor=real("raise_factor", settings.raise_factor, low=1.0, high_open=True),
        accelerated_factor=real("accelerated_factor", settings.accelerated_factor, low=1.0, high_open=True),
        cut_factor=real("cut_factor", settings.cut_factor, low=0.0, high=1.0, low_open=True, high_open=True),
        drift=real("drift", settings.drift, low=1.0, high_open=True),
        decay=real("decay", settings.decay, low=0.0, high=1.0),
        significance=real("significance", settings.significance, low=0.0, high_open=True),
    )
    _checks.check_initial(names, checked.min_scale, initial_scale, checked.max_scale)
    return checked


def trend_rule(settings: TrendSettings) -> _rule.Rule:
    """The rule with settings that are in range."""

    def init(scale: jax.Array) -> TrendState:
        return TrendState(
            scale=scale,
            step_exponent=jnp.ones_like(scale),
            rose=jnp.zeros((), bool),
            decision=jnp.full((), WAIT, jnp.int32),
            window=empty_window(),
            current=empty_window(),
            baseline=empty_window(),
            speed=jnp.zeros_like(scale),
            pause_count=jnp.zeros((), jnp.int32),
            next_pause=jnp.ones((), jnp.int32),
        )

    def update(state: TrendState, value: jax.Array) -> TrendState:
        numbers = TrendSettings(*(jnp.asarray(number, value.dtype) for number in settings))
        window = observe(_numerics.select(state.decision > WAIT, empty_window(), state.window), value)
        current = _numerics.select(state.decision > CONTINUE, empty_window(), state.current)
        current = observe(current, clip_outlier(state.baseline, value))
        decision, speed = _decide(state, window, current, value, numbers)
        factor = _factor(state, decision, numbers)
        cut_exponent = jnp.maximum(state.step_exponent, _MIN_CUT_EXPONENT)
        exponent = _numerics.where(decision == CUT, cut_exponent, state.step_exponent)
        scale = state.scale * factor ** _numerics.where(decision == DIVERGED, 1, exponent)
        was_too_high = (decision >= CUT) & state.rose
        reduced = jnp.maximum(state.step_exponent * numbers.decay, _MIN_STEP_EXPONENT)
        longer = jnp.minimum(2 * state.next_pause, _MAX_PAUSE)
        pause_count = jnp.maximum(state.pause_count - (decision > WAIT).astype(jnp.int32), 0)
        baseline = _numerics.select(decision == RENEW_BASELINE, current, state.baseline)
        baseline = _numerics.select(decision >= START, window, baseline)
        return TrendState(
            scale=jnp.clip(scale, numbers.min_scale, numbers.max_scale),
            step_exponent=_numerics.where(was_too_high, reduced, state.step_exponent),
            rose=_numerics.where(factor == 1, state.rose, factor > 1),
            decision=decision.astype(jnp.int32),
            window=window,
            current=current,
            # Losses before a divergence are not comparable with those after it.
            baseline=_numerics.select(decision == DIVERGED, empty_window(), baseline),
            speed=speed,
            pause_count=_numerics.where(was_too_high, state.next_pause, pause_count),
            next_pause=_numerics.where(was_too_high, longer, state.next_pause),
        )

    return _rule.Rule(init, update, name="trend_lr")


def _decide(
    state: TrendState, window: Window, current: Window, value: jax.Array, numbers: TrendSettings
) -> tuple[jax.Array, jax.Array]:
    """Returns the decision after a loss, the last one of both windows, and the next ``speed``."""
    baseline = state.baseline
    rise = current.mean - baseline.mean
    bound = numbers.significance * jnp.sqrt(mean_variance(current) + mean_variance(baseline))
    distance = 0.5 * (current.steps + baseline.steps)  # between the middles of both windows
    keeps_speed = (state.speed > 0) & (-rise >= _MIN_SPEED_RATIO * state.speed * distance)

    decision = _numerics.where(current.steps >= 2 * baseline.steps, RENEW_BASELINE, CONTINUE)
    decision = _numerics.where(rise < -bound, _numerics.where(keeps_speed, ACCELERATE, RAISE), decision)
    decision = _numerics.where(rise > bound, CUT, decision)
    decision = _numerics.where(baseline.steps > 0, decision, START)
    decision = _numerics.where(window.steps >= numbers.window, decision, WAIT)
    decision = _numerics.where(jnp.isfinite(value), decision, DIVERGED).astype(jnp.int8)
    raises = ((decision == RAISE) | (decision == ACCELERATE)) & (state.pause_count == 0)
    speed = _numerics.where(raises, -rise / distance, state.speed)
    return decision, _numerics.where(decision >= CUT, 0, speed)


def _factor(state: TrendState, decision: jax.Array, numbers: TrendSettings) -> jax.Array:
    """The factor of the scale, before it is raised to the step exponent."""
    factor = _numerics.where((decision == CONTINUE) | (decision == RENEW_BASELINE), numbers.drift, 1)
    factor = _numerics.where(decision == RAISE, numbers.raise_factor, factor)
    factor = _numerics.where(decision == ACCELERATE, numbers.accelerated_factor, factor)
    factor = _numerics.where(state.pause_count > 0, 1, factor)
    return _numerics.where(decision >= CUT, numbers.cut_factor, factor)
