"""The learning-rate range test: a short training with an increasing learning rate.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, Section 3.3, to which the
papers refer for an initial learning rate (LRTuner, Appendix E) and for superconvergence (ARC, Section 4). The
test is one ``lax.scan``, so that it is compiled once and nothing is transferred to the host while it runs.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _deprecated, _forwarding, _inner, _numerics


class RangeTestResult(NamedTuple):
    """Learning rates and losses of a range test."""

    learning_rates: jax.Array  # shape=(steps,), dtype=float; increasing
    losses: jax.Array  # shape=(steps,), dtype=float; on the next batch, after the step at each learning rate
    smoothed: jax.Array  # shape=(steps,), dtype=float; centered running mean; infinite after divergence


@_deprecated.renamed_arguments(min_value="min_learning_rate", max_value="max_learning_rate")
def range_test(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    batches: Any,
    *,
    inner: optax.GradientTransformation | None = None,
    min_learning_rate: ArrayLike = 1e-5,
    max_learning_rate: ArrayLike = 10.0,
    ramp: Literal["geometric", "linear"] = "geometric",
    metric_fn: Callable[[optax.Params, Any], jax.Array] | None = None,
    divergence: ArrayLike = 4.0,
) -> RangeTestResult:
    """Trains one step at each of many increasing learning rates and records the loss after each step.

    A step whose update is not finite is skipped. Up to two losses in a row that are not finite, or above the
    divergence threshold, are outliers, which the smoothed losses leave out.

    Matrix products keep the caller's precision. Batches differ by far more than rounding: with the bfloat16
    products that are a TPU's default both suggestions were those of float32 (Adam, perceptron on digits).

    Args:
      loss_fn: from parameters and a batch to the scalar loss that is differentiated.
      params: initial parameters; not changed.
      batches: a pytree of arrays with the step as leading axis, one batch per learning rate, at least 8. A
        hundred or more give a smooth curve.
      inner: an optimizer built with learning rate 1, such as ``optax.adam(1.0)``; None: plain SGD.
      min_learning_rate: first learning rate, > 0; may be traced.
      max_learning_rate: last learning rate, > ``min_learning_rate``; may be traced.
      ramp: ``"geometric"``: equal ratios of successive learning rates; ``"linear"``: equal differences.
      metric_fn: recorded in place of the loss: from parameters and a batch to a scalar for which lower is
        better (such as 1 - accuracy).
      divergence: > 1: training has diverged once three recorded losses in a row exceed their minimum so far
        by more than this multiple of the decrease up to then, or are not finite. May be traced.

    Returns:
      A :class:`RangeTestResult`, for :func:`suggest_best`, :func:`suggest_steepest` and
      :func:`greedylr_jax.plotting.plot_range_test`. Works under ``jax.jit``.

    Raises:
      ValueError: if an argument is out of its range, ``batches`` holds fewer than 8 batches, or the updates
        of ``inner`` point uphill.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from greedylr_jax.range_test import range_test, suggest_best
      >>> batches = jax.random.normal(jax.random.key(0), (200, 3))
      >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
      >>> result = range_test(loss_fn, 10 * jnp.ones(3), batches, min_learning_rate=1e-4)
      >>> bool(0.01 < suggest_best(result) < 1.0)  # gradient descent diverges above 1
      True

    Source: Smith (2017), Section 3.3.
    """
    low = _checks.check_real("min_learning_rate", min_learning_rate, low=0.0, low_open=True, high_open=True)
    high = _checks.check_real("max_learning_rate", max_learning_rate, low=0.0, low_open=True, high_open=True)
    if not _checks.is_traced(low) and not _checks.is_traced(high) and low >= high:
        raise ValueError(
            "min_learning_rate must be less than max_learning_rate, got "
            f"min_learning_rate={low!r} and max_learning_rate={high!r}."
        )
    divergence = _checks.check_real("divergence", divergence, low=1.0, low_open=True)
    _checks.check_choice("ramp", ramp, ("geometric", "linear"))
    steps = _checks.check_leading_axis("batches", batches, "steps", low=_MIN_STEPS)
    spaced = jnp.geomspace if ramp == "geometric" else jnp.linspace
    rates = spaced(low, high, steps, dtype=_numerics.default_float_dtype())
    optimizer = _forwarding.accept_extra_args(optax.sgd(1.0) if inner is None else inner)
    _inner.check_descends("range_test", optimizer, params)
    record = loss_fn if metric_fn is None else metric_fn

    def body(carry: Any, inputs: Any) -> Any:
        params, state = carry
        rate, batch, next_batch = inputs
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, new_state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=lambda point: loss_fn(point, batch)
        )
        new_params = optax.apply_updates(params, _numerics.scale_updates(updates, rate))
        carry = _numerics.select(_is_finite(updates), (new_params, new_state), carry)
        return carry, jnp.asarray(record(carry[0], next_batch), rates.dtype)

    # The first batch follows the last.
    following = jax.tree.map(lambda leaf: jnp.roll(jnp.asarray(leaf), -1, axis=0), batches)
    _, losses = jax.lax.scan(body, (params, optimizer.init(params)), (rates, batches, following))
    return RangeTestResult(rates, losses, _smooth(losses, jnp.asarray(divergence, losses.dtype)))


def suggest_best(result: RangeTestResult) -> jax.Array:
    """The learning rate after which the smoothed loss was minimal.

    If several tie, as with a metric that reaches its optimum, the highest of them. A training at a constant
    learning rate is usually stable at a fraction of it.

    Args:
      result: of :func:`range_test`.

    Returns:
      A scalar; NaN if no loss was finite, or all smoothed losses are equal.

    Examples:
      See :func:`range_test`.
    """
    minimum, maximum = jnp.min(result.smoothed), jnp.max(result.smoothed)
    rate = result.learning_rates[_last_minimum(result.smoothed)]
    return jnp.where(jnp.isfinite(minimum) & (minimum < maximum), rate, jnp.nan)


def suggest_steepest(result: RangeTestResult) -> jax.Array:
    """The learning rate at which the loss decreased fastest per step: a safer choice than
    :func:`suggest_best`.

    Differences of successive losses are mostly noise of the batches, so the slope at each step is that of a
    line fitted to the smoothed losses around it, a sixth of all steps, and only steps before the minimum at
    which their mean has decreased by 30% of the total decrease are considered.

    Args:
      result: of :func:`range_test`.

    Returns:
      A scalar; NaN if the loss never decreased.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax.range_test import RangeTestResult, suggest_steepest
      >>> rates, losses = jnp.array([0.1, 0.2, 0.4, 0.8, 1.6]), jnp.array([5.0, 4.9, 2.0, 1.0, 7.0])
      >>> print(suggest_steepest(RangeTestResult(rates, losses, losses)))
      0.4
    """
    best = _last_minimum(result.smoothed)
    means, slopes = _fit_lines(result.smoothed)
    # Before the loss has decreased the steepest slope is noise.
    candidates = jnp.isfinite(result.smoothed) & (jnp.arange(len(slopes)) <= best)
    highest = jnp.max(means, where=candidates, initial=-jnp.inf)
    decrease = highest - result.smoothed[best]
    slopes = jnp.where(candidates & (means <= highest - _DECREASED * decrease), slopes, jnp.inf)
    return jnp.where(jnp.min(slopes) < 0, result.learning_rates[jnp.argmin(slopes)], jnp.nan)


_MIN_STEPS = 8
_DIVERGED_STEPS = 3  # so many losses in a row above the threshold; fewer are outliers
_DECREASED = 0.3  # share of its decrease after which the loss is considered decreasing


def _is_finite(updates: optax.Updates) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]).all()


def _last_minimum(losses: jax.Array) -> jax.Array:
    return len(losses) - 1 - jnp.argmin(losses[::-1])


def _fit_lines(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and least-squares slope per step of the finite losses around each step, a sixth of all steps."""
    half = max(1, len(losses) // 12)
    offsets = jnp.arange(-half, half + 1, dtype=losses.dtype)
    is_finite = jnp.isfinite(losses)

    def window_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
        values = jnp.where(is_finite, values, 0)
        return jnp.convolve(values, weights[::-1], mode="full")[half : half + len(losses)]

    # The sums below cancel, so the common part of the losses is subtracted first.
    common = jnp.mean(losses, where=is_finite)
    count, first, second = (window_sum(jnp.ones_like(losses), offsets**power) for power in (0, 1, 2))
    total, moment = (window_sum(losses - common, offsets**power) for power in (0, 1))
    count = jnp.maximum(count, 1)
    variation = second - first**2 / count  # 0 where a window has one loss
    slopes = (moment - first * total / count) / jnp.where(variation > 0, variation, 1)
    return common + total / count, jnp.where(variation > 0, slopes, 0)


def _smooth(losses: jax.Array, divergence: jax.Array) -> jax.Array:
    """A centered running mean up to divergence, without outliers; infinite after divergence."""
    is_finite = jnp.isfinite(losses)
    initial = is_finite & (jnp.cumsum(is_finite) <= _MIN_STEPS)
    initial = initial.at[jnp.argmax(jnp.where(initial, losses, -jnp.inf))].set(False)  # may be an outlier
    minimum = jax.lax.cummin(jnp.where(is_finite, losses, jnp.inf))
    decrease = jnp.max(losses, where=initial, initial=-jnp.inf) - minimum
    # Until the loss has decreased by more than its own noise, a rise cannot be compared with the decrease.
    noise = jnp.std(losses, where=initial)
    is_bad = ~(losses <= minimum + divergence * jnp.maximum(decrease, noise))
    padded = jnp.concatenate([is_bad, jnp.ones(_DIVERGED_STEPS - 1, bool)])
    starts = jnp.stack([padded[shift : shift + len(losses)] for shift in range(_DIVERGED_STEPS)]).all(axis=0)
    diverged = jnp.cumsum(starts) > 0
    width = max(1, len(losses) // 40) * 2 + 1
    window = jnp.ones(width, losses.dtype)
    sums = jnp.convolve(jnp.where(is_bad, 0, losses), window, mode="same")
    counts = jnp.convolve(jnp.where(is_bad, 0, 1).astype(losses.dtype), window, mode="same")
    return jnp.where(diverged | (counts == 0), jnp.inf, sums / jnp.maximum(counts, 1))
