"""Detecting that a training has diverged, and restoring the parameters from before it did.

:func:`with_rollback` wraps any optimizer. :class:`DivergenceMonitor` decides from the losses alone, and
:mod:`greedylr_jax._snapshot` saves and restores.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _forwarding, _numerics, _observe, _rule, _snapshot
from greedylr_jax._window import (
    LONGEST,
    Window,
    empty_window,
    mean_variance,
    observe,
    rise_threshold,
    variance,
)

PATIENCE = 20  # consecutive losses above the threshold after which a training has diverged
_FLOOR = 0.05  # of the mean loss: smaller differences are noise, however constant the losses are
_CLIP, _CLIP_FROM = 4.0, 5  # a window clips losses at so many standard deviations, once it has so many
_INITIAL_RISE, _INITIAL_FALL = 0.5, 0.3  # of the initial loss: what has diverged, what has recovered
_ERRORS = 2.0  # standard errors by which the first snapshot's mean loss must be below the initial loss
_MAX_AGE = 50  # windows after which a snapshot is replaced by one that is not better


class DivergenceMonitor(NamedTuple):
    """The losses at the snapshot, and how recent losses compare with them."""

    baseline: jax.Array  # shape=(), dtype=float; mean loss at the snapshot, infinite if unknown
    threshold: jax.Array  # shape=(), dtype=float; losses above it are bad
    num_bad: jax.Array  # shape=(), dtype=int32; consecutive bad losses
    has_recovered: jax.Array  # shape=(), dtype=bool; whether a loss has been good since the last rollback
    is_initial: jax.Array  # shape=(), dtype=bool; whether the snapshot is that of the initial parameters


def empty_monitor() -> DivergenceMonitor:
    """A monitor without a baseline: only losses that are not finite are bad."""
    infinity = jnp.full((), jnp.inf, _numerics.default_float_dtype())
    return DivergenceMonitor(
        baseline=infinity,
        threshold=jnp.array(infinity),
        num_bad=jnp.zeros((), jnp.int32),
        has_recovered=jnp.ones((), bool),
        is_initial=jnp.zeros((), bool),
    )


def initial_monitor() -> DivergenceMonitor:
    """The monitor of a snapshot of the initial parameters, whose baseline is the first loss."""
    return empty_monitor()._replace(is_initial=jnp.ones((), bool))


def monitor_from(mean: jax.Array, variance: jax.Array) -> DivergenceMonitor:
    """The monitor of a new snapshot with this mean loss; ``variance`` is that of single losses."""
    threshold = jnp.maximum(rise_threshold(mean, variance), mean + _FLOOR * jnp.abs(mean))
    return empty_monitor()._replace(baseline=mean, threshold=threshold)


def is_improvement(monitor: DivergenceMonitor, window: Window) -> jax.Array:
    """Whether the mean loss of a window is below the baseline, so that a snapshot should be saved.

    The initial loss is a single one, or few. The first snapshot must be significantly below it, as otherwise
    a network that has stopped learning would be saved.
    """
    noise = _ERRORS * jnp.sqrt(variance(window) + mean_variance(window))
    noise = jnp.maximum(noise, _FLOOR * jnp.abs(monitor.baseline))
    is_significant = (window.mean < monitor.baseline - noise) & (window.finite > 1)
    return jnp.where(monitor.is_initial, is_significant, window.mean < monitor.baseline)


def observe_loss(
    monitor: DivergenceMonitor,
    loss: jax.Array,
    has_diverged: ArrayLike = False,
    patience: ArrayLike = PATIENCE,
) -> tuple[DivergenceMonitor, jax.Array]:
    """Processes one loss. Returns the new monitor and whether to restore the snapshot.

    The snapshot is to be restored after ``patience`` consecutive bad losses, or at once if ``has_diverged``.
    If restoring does not bring the loss down, the loss itself has shifted (for example new data), so the
    baseline is reset.

    While the snapshot is that of the initial parameters, a loss above 1.5 times the initial loss is bad, and
    so are those after it, until one falls below 0.7 times the initial loss: the loss of a network that has
    stopped learning is close to the initial loss.
    """
    monitor = _observe_initial_loss(monitor, loss)
    fallen = monitor.baseline - _INITIAL_FALL * jnp.abs(monitor.baseline)
    limit = jnp.where(monitor.is_initial & (monitor.num_bad > 0), fallen, monitor.threshold)
    is_bad = ~(loss <= limit) | has_diverged
    num_bad = jnp.where(is_bad, monitor.num_bad + 1, 0)
    has_diverged = (num_bad >= jnp.asarray(patience, jnp.int32)) | has_diverged
    restore, reset = has_diverged & monitor.has_recovered, has_diverged & ~monitor.has_recovered
    return DivergenceMonitor(
        baseline=jnp.where(reset, jnp.inf, monitor.baseline),
        threshold=jnp.where(reset, jnp.inf, monitor.threshold),
        num_bad=jnp.where(has_diverged, 0, num_bad),
        has_recovered=(monitor.has_recovered | ~is_bad) & ~restore,
        is_initial=monitor.is_initial,
    ), restore


def _observe_initial_loss(monitor: DivergenceMonitor, loss: jax.Array) -> DivergenceMonitor:
    """Sets the baseline from the first loss, or from that after restoring the initial parameters."""
    is_first = jnp.isinf(monitor.baseline)
    is_known = monitor.is_initial & jnp.isfinite(loss) & (is_first | ~monitor.has_recovered)
    baseline = jnp.where(is_first, loss, jnp.maximum(monitor.baseline, loss))
    threshold = baseline + _INITIAL_RISE * jnp.abs(baseline)
    return monitor._replace(
        baseline=jnp.where(is_known, baseline, monitor.baseline),
        threshold=jnp.where(is_known, threshold, monitor.threshold),
    )


class RollbackState(NamedTuple):
    """State of :func:`with_rollback`."""

    monitor: DivergenceMonitor
    window: Window  # the losses since the last opportunity for a snapshot
    age: jax.Array  # shape=(), dtype=int32; full windows since the snapshot was saved
    snapshot: _snapshot.Snapshot
    restore_steps_left: jax.Array  # shape=(), dtype=int32; further steps that restoring may take
    num_rollbacks: jax.Array  # shape=(), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32; skipped steps
    num_consecutive_skipped: jax.Array  # shape=(), dtype=int32; the last of them without a step between
    inner_state: optax.OptState


def with_rollback(
    inner: optax.GradientTransformation,
    *,
    window: ArrayLike = 20,
    patience: ArrayLike = PATIENCE,
    cut_factor: ArrayLike = 0.5,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """Wraps an optimizer so that a diverged training is rolled back to its best snapshot, at a lower rate.

    Whenever the mean of ``window`` losses is the lowest so far, the parameters and the optimizer's state are
    saved. Until it is significantly below the first loss, the snapshot is that of the initial parameters.
    A snapshot is restored

    * when a loss is not finite, at once if the updates are, and otherwise if the next one is not either;
    * when ``patience`` consecutive losses are significantly above those at the snapshot;
    * when every gradient is zero at a loss above the mean at the snapshot, as in a network of dead units;
    * when ``patience`` consecutive steps were skipped.

    A step that makes any element of the parameters or of the moments infinite or NaN is skipped: its updates
    are zero, the moments keep their values, and rules do not observe its loss. One batch with a NaN costs no
    more than that.

    Restored are the parameters and the moments (all floating point arrays of the optimizer's state), and the
    states of rules. Counts (of schedules, of bias correction), hyperparameters of
    ``optax.inject_hyperparams`` and PRNG keys continue. Gradients accumulated by ``multi_steps`` or
    ``optax.MultiSteps`` are discarded, and their count of micro-batches continues. The scale or learning rate
    of every rule inside becomes the minimum of its current value and its value at the snapshot, times
    ``cut_factor``; the rule's own minimum does not bound it until the next observation, see
    :func:`greedylr_jax.set_scale`.

    If restoring does not bring the loss down, the loss itself has shifted (for example new data), so the
    monitor's baseline is reset. A snapshot that has not improved for 50 windows is replaced by the next one,
    so that the baseline follows losses that drift.

    Args:
      inner: any transformation, with or without rules of this library (without, there is no rate to cut).
      window: losses between two opportunities for a snapshot, an integer in [2, 2**24]. This and all
        numbers may be traced.
      patience: consecutive bad losses after which the snapshot is restored, an integer >= 1.
      cut_factor: factor on the rates at each rollback, in (0, 1]; 1 leaves them alone.
      axis_name: the mapped axis, or axes, over which losses are averaged first and over which parameters and
        gradients may be sharded. All devices make the same decision.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params`` and ``value``. Its
      state holds one copy of the parameters and of the inner state. Make it the outermost transformation: a
      transformation behind it would change the restoring updates, which need further steps where one addition
      misses the snapshot by rounding. Apply it to the full parameter tree, not
      inside ``optax.masked`` or ``optax.partition``.

    Raises:
      ValueError: if a number is out of its range. Its ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params`` or ``value`` is missing, or the value is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import chain, get_scale, greedy_lr, with_rollback
      >>> tx = with_rollback(chain(optax.sgd(0.1), greedy_lr()), window=2)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 0.9, 0.8, 0.7, jnp.nan):
      ...     updates, state = tx.update(params, state, params, value=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, get_scale(state))  # those of the fourth loss, after three steps
      [0.729 0.729] 0.5

    Source: this project; after the rollback of LRTuner (:func:`greedylr_jax.lr_tuner`).
    """
    window = _checks.check_integer("window", window, low=2, high=LONGEST)
    patience = _checks.check_integer("patience", patience, low=1)
    cut_factor = _checks.check_real("cut_factor", cut_factor, low=0.0, high=1.0, low_open=True)
    settings = _Settings(window, patience)
    inner = _forwarding.accept_extra_args(inner)

    def init_fn(params: optax.Params) -> RollbackState:
        inner_state = inner.init(params)
        return RollbackState(
            monitor=initial_monitor(),
            window=empty_window(),
            age=jnp.zeros((), jnp.int32),
            snapshot=_snapshot.take_snapshot(params, inner_state),
            restore_steps_left=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            num_consecutive_skipped=jnp.zeros((), jnp.int32),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: RollbackState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RollbackState]:
        params = _snapshot.check_params("with_rollback", params, updates)
        _snapshot.check_structure("with_rollback", state.snapshot, params)
        loss = _observe.read("with_rollback", value, has_value, state.monitor.baseline.dtype, axis_name)
        extra_args |= {"value": value, "has_value": has_value}
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        skip, has_gradient = _snapshot.check_step(
            steps, params, inner_state, state.inner_state, updates, axis_name
        )
        actions, decided = _decide(settings, state, loss, ~has_gradient, skip)
        steps, inner_state, snapshot, restores = _snapshot.act(
            actions, steps, inner_state, state.snapshot, params, state.inner_state, axis_name
        )
        starts = restores & ~actions.restoring
        # A loss while restoring belongs to the diverged parameters and is ignored.
        counts = starts | ~restores
        factor = jnp.where(starts, cut_factor, 1)
        return steps, _numerics.select(counts, decided, state._replace(snapshot=(), inner_state=()))._replace(
            snapshot=snapshot,
            restore_steps_left=_snapshot.steps_left(restores, actions.restoring, state.restore_steps_left),
            num_rollbacks=state.num_rollbacks + starts.astype(jnp.int32),
            inner_state=_cut_rates(inner_state, state.inner_state, restores, factor),
        )

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


class _Settings(NamedTuple):
    """The arguments of :func:`with_rollback` that its parts read, checked."""

    window: ArrayLike
    patience: ArrayLike


def _decide(
    settings: _Settings, state: RollbackState, loss: _observe.Observation, is_dead: jax.Array, skip: jax.Array
) -> tuple[_snapshot.Actions, RollbackState]:
    """What to do with a step, and the numbers of the state after it, without the arrays."""
    restoring = state.restore_steps_left > 0
    consecutive = jnp.where(skip, state.num_consecutive_skipped + 1, 0)
    # The batch may be at fault if neither its loss nor its updates are finite. Its loss is not observed.
    is_bad_batch = ~jnp.isfinite(loss.value) & (consecutive == 1)
    observed = jnp.asarray(loss.has_value) & ~is_bad_batch
    has_diverged = (
        ~jnp.isfinite(loss.value)
        | (is_dead & (loss.value > state.monitor.baseline))
        | (consecutive >= jnp.asarray(settings.patience, jnp.int32))
    )
    monitor, restore = observe_loss(state.monitor, loss.value, has_diverged, settings.patience)
    window = observe(state.window, _clip_outlier(state.window, loss.value))
    is_full = window.steps >= jnp.asarray(settings.window, loss.value.dtype)
    is_old = state.age >= _MAX_AGE
    save = is_full & ~restore & (monitor.num_bad == 0) & (is_improvement(monitor, window) | is_old)
    monitor = _numerics.select(save, monitor_from(window.mean, variance(window)), monitor)
    clear = is_full | restore
    decided = state._replace(
        monitor=monitor,
        window=_numerics.select(clear, empty_window(), window),
        age=jnp.where(save | restore, 0, state.age + is_full.astype(jnp.int32)),
        snapshot=(),
        inner_state=(),
    )
    decided = _numerics.select(observed, decided, state._replace(snapshot=(), inner_state=()))
    skipped = skip & ~(observed & restore)
    actions = _snapshot.Actions(
        save=observed & save, skip=skipped, restore=observed & restore & ~restoring, restoring=restoring
    )
    return actions, decided._replace(
        num_skipped=state.num_skipped + skipped.astype(jnp.int32),
        num_consecutive_skipped=jnp.where(skipped, consecutive, 0),
    )


def _clip_outlier(window: Window, loss: jax.Array) -> jax.Array:
    """The loss, at most a few standard deviations from the mean of the window, once this is known."""
    deviation = jnp.maximum(jnp.sqrt(variance(window)), _FLOOR * jnp.abs(window.mean))
    low, high = window.mean - _CLIP * deviation, window.mean + _CLIP * deviation
    is_known = jnp.isfinite(loss) & (window.finite >= _CLIP_FROM)
    return jnp.where(is_known, jnp.clip(loss, low, high), loss)


def _cut_rates(
    inner_state: optax.OptState, latest: optax.OptState, restores: jax.Array, factor: jax.Array
) -> optax.OptState:
    """While restoring, the minimum of each rate in the restored and the latest state, times ``factor``."""

    def cut(restored: Any, last: Any) -> Any:
        def lower(restored: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.where(restores, jnp.minimum(restored, last) * factor.astype(restored.dtype), restored)

        return _rule.map_rates(lower, restored, last)

    return jax.tree.map(cut, inner_state, latest, is_leaf=_rule.is_rate_state)
