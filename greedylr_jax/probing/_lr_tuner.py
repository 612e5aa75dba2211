"""LRTuner: Newton's method for the learning rate, along the step that an optimizer is about to take.

N. Iyer, V. Thejas, N. Kwatra, R. Ramjee and M. Sivathanu, "LRTuner: A Learning Rate Tuner for Deep Neural
Networks", 2021. With d the direction of the optimizer and eta the rate, the loss of a *superbatch* is taken
at a few perturbed rates and a parabola put through it (equation 2),

    L(params - (eta + eps) d) = k0 + k1 eps + k2 eps^2,    best at eps = -k1 / (2 k2),

bounded by |eps|^3 < r L(params) (equation 3). In the *explore* phase the rate may only rise, in the
*exploit* phase only fall, and only once the loss hardly drops any more (Appendix B). A change of rate that
turns out bad is rolled back: rate, parameters and optimizer state.

What the paper leaves open, and what is done here:

* "Loss drop per iteration" compares the mean training losses of two successive windows, which are the
  ``recompute_every`` steps between two chances to change the rate.
* A change is bad if the relative drop after it is less than ``rollback_threshold`` of the one before it,
  by more than the noise of the means (two standard errors); or if a loss is not finite. With a threshold
  of 1 that is the paper's "reduction in loss drop": it calls nearly every change bad in a training that
  converges, whose loss drops less and less anyway.
* A proposal at or below zero, or from losses that are not finite, is ignored. Where the parabola is not
  convex the rate goes to the bound, downhill, but not below half of itself.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _inner, _numerics, _observe, _rollback, _rule
from greedylr_jax._window import LONGEST, Window, empty_window, mean_variance, observe
from greedylr_jax.probing import _probe


class Progress(NamedTuple):
    """How the loss drops; infinite where that is not known yet (a NaN would stop ``jax.debug_nans``)."""

    last_mean: jax.Array  # shape=(), dtype=float; mean loss of the last full window
    first_drop: jax.Array  # shape=(), dtype=float; drop per step in the first window of the present rate
    saturated_drop: jax.Array  # shape=(), dtype=float; the absolute saturation threshold


class Snapshot(NamedTuple):
    """The moment of the last change of rate."""

    watched: jax.Array  # shape=(), dtype=bool; whether the change is still to be judged
    settling: jax.Array  # shape=(), dtype=int32; > 0: on the way back to these parameters
    limit: jax.Array  # shape=(), dtype=float; a higher mean loss in the next window is a bad change
    learning_rate: jax.Array  # shape=(), dtype=float; the rate before the change
    progress: Progress
    params: optax.Params
    inner_state: optax.OptState


class LRTunerState(NamedTuple):
    """State of :func:`lr_tuner`."""

    rate: _rule.RateState
    step: jax.Array  # shape=(), dtype=int32; steps so far, those taken back included
    num_rollbacks: jax.Array  # shape=(), dtype=int32
    window: Window
    progress: Progress
    snapshot: Snapshot | None  # None with rollback=False
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
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """An optimizer that now and then sets its learning rate to the minimum of a parabola along its step.

    Call ``update`` with the loss of the step and with the loss on a superbatch as a function of the
    parameters: ``tx.update(grads, state, params, value=loss, value_fn=superbatch_loss(loss_fn, batches))``.

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.adam(1.0)``.
      learning_rate: the seed rate, > 0; may be traced.
      explore_steps: steps of the explore phase, an integer >= 0; typically 20% to 30% of the training. May
        be traced.
      recompute_every: steps between two chances to change the rate, an integer in [1, 2**24]; the first is at
        step number ``recompute_every``. Once or twice an epoch is typical. May be traced.
      num_samples: losses that the parabola is fitted to, an integer >= 3; each costs one forward pass of
        the superbatch. Not used with ``method="taylor"``.
      epsilon_threshold: r of equation 3, > 0: a rate changes by less than the cube root of r times the
        loss. The paper takes 1e-3 for images, 1e-8 to 1e-12 where rates are about 1e-5. May be traced.
      saturation_threshold: >= 1: in the exploit phase the rate may fall once the loss drop per step has
        fallen by more than this factor since this rate began. The drop at the first such moment is
        the threshold from then on. The paper takes 100 to 500 for images, 2 to 5 for text. May be traced.
      method: ``"fit"``: a parabola through ``num_samples`` losses. ``"taylor"``: its exact coefficients, by
        one forward pass with second derivatives, which costs as much as about 5 plain ones.
      probe_width: the samples lie between (1 - width) and (1 + width) times the rate, or closer together
        where equation 3 allows less, in (0, 1]. May be traced.
      rollback: whether a bad change is taken back. Costs one copy of parameters and inner state.
      rollback_threshold: in [0, 1]: a change is bad if the relative loss drop after it is less than this
        fraction of the one before; 1 is the paper to the letter. May be traced.
      axis_name: the mapped axis, or axes, over which losses are averaged first, so that all devices decide
        alike.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params``, ``value`` and
      ``value_fn``. Rates and losses are float32 or wider. Under ``jax.vmap`` the probe runs at every step.
      A rollback is the update that leads back to the parameters of the snapshot; where one addition cannot
      reach them to the last bit, up to three more steps do, whose gradients are not used. Keep what changes
      updates (weight decay, clipping) in ``inner`` and not behind it. Parameters must all be seen: not
      inside ``optax.masked`` or ``optax.partition``.

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
    seed_rate = _checks.check_real("learning_rate", learning_rate, low=0.0, low_open=True, high_open=True)
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
        axis_name=axis_name,
    )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> LRTunerState:
        _inner.check_descends("lr_tuner", inner, params)
        inner_state = inner.init(params)
        return LRTunerState(
            rate=_rule.RateState(_float(seed_rate)),
            step=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
            window=empty_window(),
            progress=_unknown_progress(),
            snapshot=_empty_snapshot(params, inner_state, seed_rate) if rollback else None,
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
        _probe.check_value_fn("lr_tuner", value_fn, params)
        loss, observed = _observe.read_loss("lr_tuner", value, has_value, state.window.mean.dtype, axis_name)
        extra_args |= {
            "value": loss if value is None else value,
            "value_fn": value_fn,
            "has_value": has_value,
        }
        step, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        direction = jax.tree.map(jnp.negative, step)

        window = _numerics.select(observed, observe(state.window, loss), state.window)
        ends = observed & (window.steps >= jnp.asarray(settings.recompute_every, loss.dtype))
        bad = _is_bad(state.snapshot, window, loss, ends) & observed
        learning_rate, progress = _change_rate(
            settings,
            state,
            window,
            ends & ~bad & jnp.isfinite(loss),
            lambda rate: _propose(settings, rate, params, direction, loss, value_fn),
        )
        steps = _numerics.scale_updates(direction, -learning_rate)
        advanced = LRTunerState(
            rate=_rule.RateState(learning_rate),
            step=optax.safe_increment(state.step),
            num_rollbacks=state.num_rollbacks,
            window=_numerics.select(ends, empty_window(), window),
            progress=_numerics.select(ends, progress, state.progress),
            snapshot=None,
            inner_state=inner_state,
        )
        if state.snapshot is None:
            return steps, advanced

        changed = learning_rate != state.rate.learning_rate
        # A change that is watched must leave something to go back from: NaN plus anything is NaN.
        steps = _rollback.where_finite(state.snapshot.watched | changed, steps, params)
        settles = state.snapshot.settling > 0
        steps, inner_state, kept, goes_back = _rollback.exchange(
            steps,
            inner_state,
            _rollback.Kept(state.snapshot.params, state.snapshot.inner_state),
            params=params,
            old_inner_state=state.inner_state,
            needed=bad | changed | settles,
            goes_back=bad,
            settles=settles,
            takes=changed,
        )
        limit = _highest_mean(window, state.progress.last_mean, settings.rollback_threshold)
        taken = Snapshot(
            watched=jnp.asarray(True),
            settling=jnp.zeros((), jnp.int32),
            limit=limit,
            learning_rate=state.rate.learning_rate,
            progress=advanced.progress._replace(first_drop=state.progress.first_drop),
            params=None,
            inner_state=None,
        )
        held = state.snapshot._replace(
            watched=state.snapshot.watched & ~ends,
            settling=jnp.zeros((), jnp.int32),
            params=None,
            inner_state=None,
        )
        advanced = advanced._replace(snapshot=_numerics.select(changed, taken, held), inner_state=None)
        numbers = _numerics.select(goes_back, _returned(state), advanced)
        snapshot = numbers.snapshot._replace(params=kept.params, inner_state=kept.inner_state)
        return steps, numbers._replace(snapshot=snapshot, inner_state=inner_state)

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
    axis_name: Hashable | None


def _change_rate(
    settings: _Settings,
    state: LRTunerState,
    window: Window,
    may_change: jax.Array,
    propose: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Progress]:
    """The rate from this step on, by the phase that the training is in, and the drop of the loss so far."""
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
    allowed = jnp.where(explores, proposal > learning_rate, proposal < learning_rate) & (proposal > 0)
    first_drop = jnp.where(allowed, jnp.inf, first_drop)  # a new rate begins
    return jnp.where(allowed, proposal, learning_rate), Progress(mean, first_drop, threshold)


def _propose(
    settings: _Settings,
    learning_rate: jax.Array,
    params: optax.Params,
    direction: optax.Updates,
    loss: jax.Array,
    value_fn: _probe.ValueFn,
) -> jax.Array:
    """The rate of equations 2 and 3."""
    bound = jnp.cbrt(jnp.asarray(settings.epsilon_threshold, loss.dtype) * jnp.abs(loss))
    step = (value_fn, params, direction, learning_rate, bound)
    if settings.method == "taylor":
        return _probe.rate_by_taylor(*step, axis_name=settings.axis_name)
    width = _sample_width(learning_rate, bound, settings.probe_width)
    return _probe.rate_by_fit(*step, width, settings.num_samples, axis_name=settings.axis_name)


def _float(value: ArrayLike) -> jax.Array:
    return jnp.array(value, _numerics.default_float_dtype())


def _sample_width(learning_rate: jax.Array, bound: jax.Array, probe_width: ArrayLike) -> jax.Array:
    """Half the range of the samples: the rate's own size, less where equation 3 allows less.

    But no less than a second difference needs: below the fourth root of the precision, rounding wins.
    """
    least = float(jnp.finfo(learning_rate.dtype).eps) ** 0.25
    return jnp.clip(bound, least * learning_rate, jnp.asarray(probe_width, bound.dtype) * learning_rate)


def _unknown_progress() -> Progress:
    return Progress(_float(jnp.inf), _float(jnp.inf), _float(jnp.inf))


def _empty_snapshot(params: optax.Params, inner_state: optax.OptState, learning_rate: ArrayLike) -> Snapshot:
    return Snapshot(
        watched=jnp.asarray(False),
        settling=jnp.zeros((), jnp.int32),
        limit=_float(jnp.inf),
        learning_rate=_float(learning_rate),
        progress=_unknown_progress(),
        # Copies: the same array twice in a state could not be donated.
        params=jax.tree.map(jnp.array, params),
        inner_state=jax.tree.map(jnp.array, inner_state),
    )


def _is_bad(snapshot: Snapshot | None, window: Window, loss: jax.Array, ends: jax.Array) -> jax.Array:
    """Whether the last change of rate has just turned out bad."""
    if snapshot is None:
        return jnp.asarray(False)
    over = ends & ~((window.finite > 0) & (window.mean <= snapshot.limit))
    return snapshot.watched & (over | ~jnp.isfinite(loss))


def _highest_mean(window: Window, last_mean: jax.Array, rollback_threshold: ArrayLike) -> jax.Array:
    """The mean loss of the next window above which a change made now counts as bad."""
    noise = 2 * jnp.sqrt(2 * mean_variance(window))
    drop = last_mean - window.mean
    relative = (last_mean > 0) & (window.mean > 0)
    drop = jnp.where(relative, drop * window.mean / jnp.where(relative, last_mean, 1), drop)
    # A loss that was rising may go on rising as it did: the change did not make that worse.
    expected = jnp.where(drop > 0, jnp.asarray(rollback_threshold, drop.dtype) * drop, drop)
    return window.mean - jnp.where(jnp.isfinite(last_mean), expected, 0) + noise


def _returned(state: LRTunerState) -> LRTunerState:
    """The numbers of the state on the way back to the snapshot, whose arrays are left out."""
    snapshot = state.snapshot
    begins = snapshot.settling == 0
    left = jnp.where(begins, _rollback.SETTLING_STEPS, snapshot.settling) - 1
    return LRTunerState(
        rate=_rule.RateState(snapshot.learning_rate),
        step=optax.safe_increment(state.step),
        num_rollbacks=state.num_rollbacks + begins.astype(jnp.int32),
        window=empty_window(),
        progress=snapshot.progress,
        snapshot=snapshot._replace(watched=jnp.asarray(False), settling=left, params=None, inner_state=None),
        inner_state=None,
    )
