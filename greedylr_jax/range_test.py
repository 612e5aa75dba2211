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

from greedylr_jax import _checks, _deprecated, _inner, _numerics


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
      divergence: > 1: the test has diverged once the recorded loss exceeds its minimum so far by more than
        this multiple of the decrease up to then. May be traced.

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
    _checks.check_order("min_learning_rate", low, "max_learning_rate", high)
    divergence = _checks.check_real("divergence", divergence, low=1.0, low_open=True)
    _checks.check_choice("ramp", ramp, ("geometric", "linear"))
    steps = _checks.check_leading_axis("batches", batches, "steps", low=_MIN_STEPS)
    spaced = jnp.geomspace if ramp == "geometric" else jnp.linspace
    rates = spaced(low, high, steps, dtype=_numerics.default_float_dtype())
    optimizer = optax.with_extra_args_support(optax.sgd(1.0) if inner is None else inner)
    _inner.check_descends("range_test", optimizer, params)
    record = loss_fn if metric_fn is None else metric_fn

    def body(carry: Any, inputs: Any) -> Any:
        params, state = carry
        rate, batch, next_batch = inputs
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=lambda point: loss_fn(point, batch)
        )
        params = optax.apply_updates(params, _numerics.scale_updates(updates, rate))
        return (params, state), jnp.asarray(record(params, next_batch), rates.dtype)

    # The first batch follows the last.
    following = jax.tree.map(lambda leaf: jnp.roll(jnp.asarray(leaf), -1, axis=0), batches)
    _, losses = jax.lax.scan(body, (params, optimizer.init(params)), (rates, batches, following))
    return RangeTestResult(rates, losses, _smooth(losses, jnp.asarray(divergence, losses.dtype)))


_MIN_STEPS = 8


def suggest_best(result: RangeTestResult) -> jax.Array:
    """The rate after which the smoothed loss was least: the highest that still learns.

    Args:
      result: of :func:`range_test`.

    Returns:
      A scalar; NaN if the loss was never finite.

    Examples:
      See :func:`range_test`.
    """
    rate = result.learning_rates[jnp.argmin(result.smoothed)]
    return jnp.where(jnp.isfinite(jnp.min(result.smoothed)), rate, jnp.nan)


def suggest_steepest(result: RangeTestResult) -> jax.Array:
    """The rate at which the smoothed loss fell fastest, per step of the ramp: a safer choice.

    Args:
      result: of :func:`range_test`.

    Returns:
      A scalar; NaN if the loss never fell.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax.range_test import RangeTestResult, suggest_steepest
      >>> rates, losses = jnp.array([0.1, 0.2, 0.4, 0.8, 1.6]), jnp.array([5.0, 4.9, 2.0, 1.0, 7.0])
      >>> print(suggest_steepest(RangeTestResult(rates, losses, losses)))
      0.4
    """
    slopes = jnp.gradient(jnp.where(jnp.isfinite(result.smoothed), result.smoothed, jnp.nan))
    before_best = jnp.arange(len(slopes)) <= jnp.argmin(result.smoothed)
    slopes = jnp.where(before_best & jnp.isfinite(slopes), slopes, jnp.inf)
    rate = result.learning_rates[jnp.argmin(slopes)]
    return jnp.where(jnp.min(slopes) < 0, rate, jnp.nan)


def _smooth(losses: jax.Array, divergence: jax.Array) -> jax.Array:
    """A centred mean, which lags behind the rate by nothing, of what comes before the divergence."""
    known = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    least = jax.lax.cummin(known)
    fall = jnp.max(jnp.where(jnp.isfinite(known[:_MIN_STEPS]), known[:_MIN_STEPS], -jnp.inf)) - least
    # Until the loss has fallen by more than its own noise there is nothing to compare a rise with.
    noise = jnp.std(known[:_MIN_STEPS])
    diverged = jnp.cumsum(~(known <= least + divergence * jnp.maximum(fall, noise))) > 0
    weights = jnp.where(diverged, 0, 1).astype(known.dtype)
    width = max(1, len(losses) // 40) * 2 + 1
    window = jnp.ones(width, known.dtype)
    sums = jnp.convolve(jnp.where(diverged, 0, known), window, mode="same")
    counts = jnp.convolve(weights, window, mode="same")
    return jnp.where(diverged, jnp.inf, sums / jnp.maximum(counts, 1))
