"""LRTuner: Newton's method for the learning rate, along the next step of an optimizer.

N. Iyer, V. Thejas, N. Kwatra, R. Ramjee and M. Sivathanu, "LRTuner: A Learning Rate Tuner for Deep Neural
Networks", 2021. With d the optimizer's direction and eta the rate, the loss of a *superbatch* is evaluated at
a few perturbed rates, and a parabola fitted to it (equation 2),

    L(params - (eta + eps) d) = k0 + k1 eps + k2 eps^2,    minimum at eps = -k1 / (2 k2),

bounded by ``|eps|^3 < r L(params)`` (equation 3). In the *explore* phase the rate may only increase, in the
*exploit* phase only decrease, and only once the loss has saturated (Appendix B). A bad change of rate is
rolled back: rate, parameters and optimizer state.

The paper leaves some details open. In this implementation:

* "Loss drop per iteration" compares the mean training losses of two successive windows of
  ``recompute_every`` steps, the interval between two opportunities to change the rate.
* A change is bad if the relative drop after it is less than ``rollback_threshold`` of the drop before it, by
  more than the noise of the means (two standard errors); or if a loss is not finite. A threshold of 1 is
  the paper's "reduction in loss drop". It rejects nearly every change in a converging training, whose loss
  drops less and less anyway.
* A proposal at or below zero, or from losses that are not finite, is ignored. Where the parabola is not
  convex the rate moves downhill to the bound, but not below half of itself.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _forwarding, _inner, _numerics, _observe, _rule, _snapshot
from greedylr_jax._window import LONGEST, Window, empty_window, mean_variance, observe
from greedylr_jax.probing import _probe


class Progress(NamedTuple):
    """How fast the loss drops; infinite where unknown (a NaN would stop ``jax.debug_nans``)."""

    last_mean: jax.Array  # shape=(), dtype=float; mean loss of the last full window
    first_drop: jax.Array  # shape=(), dtype=float; drop per step in the first window of the present rate
    saturated_drop: jax.Array  # shape=(), dtype=float; the absolute saturation threshold


class RateChange(NamedTuple):
    """The last change of the rate."""

    is_pending: jax.Array  # shape=(), dtype=bool; the next window decides whether to roll it back
    threshold: jax.Array  # shape=(), dtype=float; mean loss of the next window above which the change is bad
    previous_rate: jax.Array  # shape=(), dtype=float
    progress: Progress  # at the change


class LRTunerState(NamedTuple):
    """State of :func:`lr_tuner`."""

    rate: _rule.RateState
    step: jax.Array  # shape=(), dtype=int32; steps so far, including those rolled back
    num_rollbacks: jax.Array  # shape=(), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32; steps skipped because they were not finite
    window: Window
    progress: Progress
    change: RateChange
    restore_steps_left: jax.Array  # shape=(), dtype=int32; further steps that restoring may take
    snapshot: _snapshot.Snapshot | None  # from before the last change; None with rollback=False
    inner_state: optax.OptState


def lr_tuner(
    inner: optax.GradientTransformation,
    learning_rate: ArrayLike,
    *,
    explore_steps: ArrayLike,
    recompute_every: ArrayLike,
    num_samples: int = 3,
    epsilon_threshold: ArrayLike = 1e-3,
    saturation_threshold: ArrayLike = 100.0,
    method: Literal["fit", "taylor"] = "fit",
    probe_width: ArrayLike = 0.5,
    rollback: bool = True,
    rollback_threshold: ArrayLike = 0.1,
    min_learning_rate: ArrayLike = 0.0,
    max_learning_rate: ArrayLike = jnp.inf,
    matmul_precision: Literal["default", "high", "highest"] | None = "highest",
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """An optimizer that periodically sets its learning rate to the minimum of a parabola along its step.

    Call ``update`` with the loss of the step and with the loss on a superbatch as a function of the
    parameters: ``tx.update(grads, state, params, value=loss, value_fn=superbatch_loss(loss_fn, batches))``.

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.sgd(1.0, momentum=0.9)`` or
        ``optax.adam(1.0)``.
      learning_rate: the initial rate, > 0; may be traced.
      explore_steps: steps of the explore phase, an integer >= 0; typically 20% to 30% of the training. May
        be traced.
      recompute_every: steps between two opportunities to change the rate, an integer in [1, 2**24]; the
        first is at step number ``recompute_every``. Once or twice an epoch is typical. May be traced.
      num_samples: losses that the parabola is fitted to, an integer >= 3; each costs one forward pass of
        the superbatch. Not used with ``method="taylor"``.
      epsilon_threshold: r of equation 3, > 0: a rate changes by less than the cube root of r times the
        loss. The paper uses 1e-3 for images, 1e-8 to 1e-12 where rates are about 1e-5. May be traced.
      saturation_threshold: >= 1: in the exploit phase the rate may decrease once the loss drop per step has
        fallen by more than this factor since this rate was set. The drop at the first such moment is
        the threshold from then on. The paper uses 100 to 500 for images, 2 to 5 for text. May be traced.
      method: ``"fit"``: a parabola through ``num_samples`` losses. ``"taylor"``: its exact coefficients, by
        one forward pass with second derivatives, which costs as much as about 5 plain ones.
      probe_width: the samples lie between (1 - width) and (1 + width) times the rate, or closer together
        where equation 3 allows less, in (0, 1]. May be traced.
      rollback: whether a bad change is rolled back. Costs one copy of parameters and inner state.
      rollback_threshold: in [0, 1]: a change is bad if the relative loss drop after it is less than this
        fraction of the drop before it; 1 is the paper to the letter. May be traced.
      min_learning_rate: lower bound of the rate, in [0, ``learning_rate``]. May be traced.
      max_learning_rate: upper bound of the rate, >= ``learning_rate``. May be traced.
      matmul_precision: precision of the matrix products in ``value_fn``, as in
        ``jax.default_matmul_precision``: ``"highest"`` (float32), ``"high"``, ``"default"``, or None for that
        of the caller. The parabola rests on small differences of losses: with the bfloat16 products that are
        a TPU's default, a fit at rate 0.1 proposed 738 times the rate instead of 41 times (SGD, perceptron on
        digits), where the minimum is at 42; ``method="taylor"`` erred by 0.4% at most. On a TPU a
        product in float32 costs six in bfloat16. Products with a precision of their own are not affected.
      axis_name: the mapped axis, or axes, over which losses are averaged first, so that all devices decide
        alike.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params``, ``value`` and
      ``value_fn``. Rates and losses are float32 or wider. Under ``jax.vmap`` the probe runs at every step.
      A rollback is the update from the current parameters to the snapshot's; where one addition misses them
      by rounding, further steps follow, whose gradients are not used. Parameters and floating point arrays of
      the inner state are restored; counts (of schedules, of bias correction) and PRNG keys continue. With
      ``rollback``, a step that makes any element of the parameters or moments infinite or NaN is skipped: the
      updates are zero, and the moments keep their values. Keep transformations of the
      updates (weight decay, clipping) in ``inner`` and not behind it. Apply it to the full parameter tree,
      not inside ``optax.masked`` or ``optax.partition``.

    Raises:
      ValueError: if a number is out of its range. Its ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params``, ``value`` or ``value_fn`` is missing or the value is not a real scalar.

    Examples:
      On a quadratic one step of gradient descent at the proposed rate minimises along the gradient:

      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import get_learning_rate, lr_tuner
      >>> loss_fn = lambda params: jnp.sum(2.0 * params**2)
      >>> tx = lr_tuner(optax.sgd(1.0), 0.1, explore_steps=10, recompute_every=1, epsilon_threshold=1.0)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
      >>> print(f"{get_learning_rate(state):.4f}")
      0.2500

    Source: LRTuner, Section 2 and Appendices B to E.
    """
    settings = _Settings(
        explore_steps=_checks.check_integer("explore_steps", explore_steps),
        recompute_every=_checks.check_integer("recompute_every", recompute_every, low=1, high=LONGEST),
        num_samples=_checks.check_static_integer("num_samples", num_samples, low=3),
        epsilon_threshold=_checks.check_real(
            "epsilon_threshold", epsilon_threshold, low=0.0, low_open=True, high_open=True
        ),
        saturation_threshold=_checks.check_real("saturation_threshold", saturation_threshold, low=1.0),
        method=_checks.check_choice("method", method, ("fit", "taylor")),
        probe_width=_checks.check_real("probe_width", probe_width, low=0.0, high=1.0, low_open=True),
        rollback_threshold=_checks.check_real("rollback_threshold", rollback_threshold, low=0.0, high=1.0),
        min_learning_rate=_checks.check_real("min_learning_rate", min_learning_rate, low=0.0, high_open=True),
        max_learning_rate=_checks.check_real("max_learning_rate", max_learning_rate, low=0.0, low_open=True),
        axis_name=axis_name,
    )
    initial_rate = _checks.check_initial(
        ("min_learning_rate", "learning_rate", "max_learning_rate"),
        settings.min_learning_rate,
        learning_rate,
        settings.max_learning_rate,
    )
    precision = _checks.check_precision(matmul_precision)
    inner = _forwarding.accept_extra_args(inner)

    def init_fn(params: optax.Params) -> LRTunerState:
        _inner.check_descends("lr_tuner", inner, params)
        inner_state = inner.init(params)
        return LRTunerState(
            rate=_rule.RateState(_float(initial_rate)),
            step=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            window=empty_window(),
            progress=_unknown_progress(),
            change=_no_change(initial_rate),
            restore_steps_left=jnp.zeros((), jnp.int32),
            snapshot=_snapshot.take_snapshot(params, inner_state) if rollback else None,
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: LRTunerState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        value_fn: _probe.ValueFn | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LRTunerState]:
        loss_fn = _probe.check_value_fn("lr_tuner", value_fn, params)
        loss_fn = _numerics.at_precision(loss_fn, precision)
        assert params is not None
        trained = _snapshot.check_params("lr_tuner", params, updates)
        if state.snapshot is not None:
            _snapshot.check_structure("lr_tuner", state.snapshot, trained)
        loss, has_value_now = _observe.read("lr_tuner", value, has_value, state.window.mean.dtype, axis_name)
        observed = jnp.asarray(has_value_now)
        extra_args |= {"value": loss if value is None else value, "has_value": has_value}
        step, inner_state = inner.update(updates, state.inner_state, trained, value_fn=value_fn, **extra_args)

        window = _numerics.select(observed, observe(state.window, loss), state.window)
        is_full = observed & (window.steps >= jnp.asarray(settings.recompute_every, loss.dtype))
        is_bad = observed & _is_bad(state.change, window, loss, is_full)
        learning_rate, progress = _next_rate(
            settings,
            state,
            window,
            is_full & ~is_bad & jnp.isfinite(loss),
            lambda rate: _propose(settings, rate, params, step, loss, loss_fn),
        )
        advanced = state._replace(
            rate=_rule.RateState(learning_rate),
            step=optax.safe_increment(state.step),
            window=_numerics.select(is_full, empty_window(), window),
            progress=_numerics.select(is_full, progress, state.progress),
            inner_state=inner_state,
        )
        steps = _numerics.scale_updates(step, learning_rate)
        if state.snapshot is None:
            return steps, advanced
        return _roll_back(settings, state, advanced, state.snapshot, window, steps, trained, is_full, is_bad)

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


class _Settings(NamedTuple):
    """The arguments of :func:`lr_tuner` that its parts read, checked."""

    explore_steps: ArrayLike
    recompute_every: ArrayLike
    num_samples: int
    epsilon_threshold: ArrayLike
    saturation_threshold: ArrayLike
    method: str
    probe_width: ArrayLike
    rollback_threshold: ArrayLike
    min_learning_rate: ArrayLike
    max_learning_rate: ArrayLike
    axis_name: Hashable | None


def _next_rate(
    settings: _Settings,
    state: LRTunerState,
    window: Window,
    may_change: jax.Array,
    propose: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Progress]:
    """The rate from this step on, according to the phase, and the progress at the end of this window."""
    progress = state.progress
    mean = jnp.where(window.finite > 0, window.mean, jnp.inf)
    drop = (progress.last_mean - mean) / jnp.maximum(window.steps, 1)
    drop = jnp.where(jnp.isfinite(drop), drop, jnp.inf)
    first_drop = jnp.where(jnp.isfinite(progress.first_drop), progress.first_drop, drop)

    explores = state.step < jnp.asarray(settings.explore_steps, jnp.int32)
    has_crossed = jnp.isfinite(progress.saturated_drop)
    ratio = jnp.asarray(settings.saturation_threshold, drop.dtype)
    saturated = jnp.where(
        has_crossed, drop <= progress.saturated_drop, (drop <= 0) | (first_drop > ratio * drop)
    )
    saturated &= may_change & ~explores & jnp.isfinite(first_drop)
    # A drop below zero would be a threshold that only a rising loss meets.
    threshold = jnp.where(saturated & ~has_crossed, jnp.maximum(drop, 0), progress.saturated_drop)

    learning_rate = state.rate.learning_rate
    proposal = jax.lax.cond(
        may_change & (explores | saturated), lambda: propose(learning_rate), lambda: learning_rate
    )
    is_allowed = jnp.where(explores, proposal > learning_rate, proposal < learning_rate) & (proposal > 0)
    new_rate = jnp.where(is_allowed, _clip(settings, proposal), learning_rate)
    first_drop = jnp.where(new_rate != learning_rate, jnp.inf, first_drop)
    return new_rate, Progress(mean, first_drop, threshold)


def _clip(settings: _Settings, rate: jax.Array) -> jax.Array:
    low, high = (
        jnp.asarray(bound, rate.dtype) for bound in (settings.min_learning_rate, settings.max_learning_rate)
    )
    return jnp.clip(rate, low, high)


def _propose(
    settings: _Settings,
    learning_rate: jax.Array,
    params: optax.Params,
    step: optax.Updates,
    loss: jax.Array,
    value_fn: _probe.ValueFn,
) -> jax.Array:
    """The rate of equations 2 and 3; ``step`` is the optimizer's step at rate 1."""
    bound = jnp.cbrt(jnp.asarray(settings.epsilon_threshold, loss.dtype) * jnp.abs(loss))
    direction = jax.tree.map(jnp.negative, step)
    line = (value_fn, params, direction, learning_rate, bound)
    if settings.method == "taylor":
        return _probe.rate_by_taylor(*line, axis_name=settings.axis_name)
    width = _sample_width(learning_rate, bound, settings.probe_width)
    return _probe.rate_by_fit(*line, width, settings.num_samples, axis_name=settings.axis_name)


def _float(value: ArrayLike) -> jax.Array:
    return jnp.array(value, _numerics.default_float_dtype())


def _sample_width(learning_rate: jax.Array, bound: jax.Array, probe_width: ArrayLike) -> jax.Array:
    """Half the range of the samples: proportional to the rate, less where equation 3 allows less.

    The lower bound keeps the second difference above rounding: the fourth root of the precision.
    """
    minimum = float(jnp.finfo(learning_rate.dtype).eps) ** 0.25
    return jnp.clip(bound, minimum * learning_rate, jnp.asarray(probe_width, bound.dtype) * learning_rate)


def _unknown_progress() -> Progress:
    return Progress(_float(jnp.inf), _float(jnp.inf), _float(jnp.inf))


def _no_change(learning_rate: ArrayLike) -> RateChange:
    return RateChange(
        is_pending=jnp.asarray(False),
        threshold=_float(jnp.inf),
        previous_rate=_float(learning_rate),
        progress=_unknown_progress(),
    )


def _is_bad(change: RateChange, window: Window, loss: jax.Array, is_full: jax.Array) -> jax.Array:
    """Whether the losses show that the last change of the rate was bad."""
    is_above = is_full & ~((window.finite > 0) & (window.mean <= change.threshold))
    return change.is_pending & (is_above | ~jnp.isfinite(loss))


def _threshold(window: Window, last_mean: jax.Array, rollback_threshold: ArrayLike) -> jax.Array:
    """The mean loss of the next window above which a change made now is bad."""
    noise = 2 * jnp.sqrt(2 * mean_variance(window))
    drop = last_mean - window.mean
    is_relative = (last_mean > 0) & (window.mean > 0)
    drop = jnp.where(is_relative, drop * window.mean / jnp.where(is_relative, last_mean, 1), drop)
    # A loss that was rising before the change may continue to rise at that speed.
    expected = jnp.where(drop > 0, jnp.asarray(rollback_threshold, drop.dtype) * drop, drop)
    return window.mean - jnp.where(jnp.isfinite(last_mean), expected, 0) + noise


def _roll_back(
    settings: _Settings,
    state: LRTunerState,
    advanced: LRTunerState,
    snapshot: _snapshot.Snapshot,
    window: Window,
    steps: optax.Updates,
    params: optax.Params,
    is_full: jax.Array,
    is_bad: jax.Array,
) -> tuple[optax.Updates, LRTunerState]:
    """Restores the snapshot after a bad change, saves one before a new change, skips non-finite steps.

    ``advanced`` is the state after this step where there is no rollback; ``window`` are its losses.
    """
    learning_rate, states = state.rate.learning_rate, (advanced.inner_state, state.inner_state)
    has_changed = advanced.rate.learning_rate != learning_rate
    restoring = state.restore_steps_left > 0
    skip, _ = _snapshot.check_step(steps, params, *states, axis_name=settings.axis_name)
    actions = _snapshot.Actions(save=has_changed, skip=skip, restore=is_bad, restoring=restoring)
    steps, inner_state, snapshot, restores = _snapshot.act(
        actions, steps, states[0], snapshot, params, states[1], settings.axis_name
    )
    new_change = RateChange(
        is_pending=jnp.asarray(True),
        threshold=_threshold(window, state.progress.last_mean, settings.rollback_threshold),
        previous_rate=learning_rate,
        progress=advanced.progress._replace(first_drop=state.progress.first_drop),
    )
    old_change = state.change._replace(is_pending=state.change.is_pending & ~is_full)
    change = _numerics.select(has_changed, new_change, old_change)
    restored_change = state.change._replace(is_pending=jnp.asarray(False))
    starts = restores & ~restoring
    return steps, LRTunerState(
        rate=_numerics.select(restores, _rule.RateState(state.change.previous_rate), advanced.rate),
        step=advanced.step,
        num_rollbacks=state.num_rollbacks + starts.astype(jnp.int32),
        num_skipped=state.num_skipped + (skip & ~restores).astype(jnp.int32),
        window=_numerics.select(restores, empty_window(), advanced.window),
        progress=_numerics.select(restores, state.change.progress, advanced.progress),
        change=_numerics.select(restores, restored_change, change),
        restore_steps_left=_snapshot.steps_left(restores, restoring, state.restore_steps_left),
        snapshot=snapshot,
        inner_state=inner_state,
    )
