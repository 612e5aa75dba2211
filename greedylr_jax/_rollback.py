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

from greedylr_jax import _checks, _numerics, _observe, _rule, _snapshot
from greedylr_jax._window import LONGEST, Window, empty_window, observe, rise_limit, variance

PATIENCE = 20  # consecutive losses above the threshold after which a training has diverged


class DivergenceMonitor(NamedTuple):
    """The losses at the snapshot, and how recent losses compare with them."""

    baseline: jax.Array  # shape=(), dtype=float; mean loss at the snapshot, infinite if unknown
    threshold: jax.Array  # shape=(), dtype=float; losses above it are bad
    num_bad: jax.Array  # shape=(), dtype=int32; consecutive bad losses
    has_recovered: jax.Array  # shape=(), dtype=bool; whether a loss has been good since the last rollback


def empty_monitor() -> DivergenceMonitor:
    """A monitor without a baseline: only losses that are not finite are bad."""
    infinity = jnp.full((), jnp.inf, _numerics.default_float_dtype())
    return DivergenceMonitor(infinity, jnp.array(infinity), jnp.zeros((), jnp.int32), jnp.ones((), bool))


def monitor_from(mean: jax.Array, variance: jax.Array) -> DivergenceMonitor:
    """The monitor of a new snapshot with this mean loss; ``variance`` is that of single losses."""
    return empty_monitor()._replace(baseline=mean, threshold=rise_limit(mean, variance))


def is_improvement(monitor: DivergenceMonitor, mean: jax.Array) -> jax.Array:
    """Whether a window's mean loss is below the baseline, so that a snapshot should be saved."""
    return mean < monitor.baseline


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
    """
    is_bad = ~(loss <= monitor.threshold) | has_diverged
    num_bad = jnp.where(is_bad, monitor.num_bad + 1, 0)
    has_diverged = (num_bad >= jnp.asarray(patience, jnp.int32)) | has_diverged
    restore, reset = has_diverged & monitor.has_recovered, has_diverged & ~monitor.has_recovered
    return DivergenceMonitor(
        baseline=jnp.where(reset, jnp.inf, monitor.baseline),
        threshold=jnp.where(reset, jnp.inf, monitor.threshold),
        num_bad=jnp.where(has_diverged, 0, num_bad),
        has_recovered=(monitor.has_recovered | ~is_bad) & ~restore,
    ), restore


class RollbackState(NamedTuple):
    """State of :func:`with_rollback`."""

    monitor: DivergenceMonitor
    window: Window  # the losses since the last opportunity for a snapshot
    snapshot: _snapshot.Snapshot
    restore_steps_left: jax.Array  # shape=(), dtype=int32; further steps that restoring may take
    num_rollbacks: jax.Array  # shape=(), dtype=int32
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
    saved. They are restored

    * when a loss is not finite;
    * when ``patience`` consecutive losses are significantly above those at the snapshot;
    * when every gradient is zero at a loss above the mean at the snapshot, as in a network of dead units.

    The scale or learning rate of every rule inside becomes the minimum of its current value and its value at
    the snapshot, times ``cut_factor``; the rule's own minimum does not bound it. If restoring does not bring
    the loss down, the loss itself has shifted (for example new data), so the monitor's baseline is reset.

    Args:
      inner: any transformation, with or without rules of this library (without, there is no rate to cut).
      window: losses between two opportunities for a snapshot, an integer in [2, 2**24]. This and all
        numbers may be traced.
      patience: consecutive bad losses after which the snapshot is restored, an integer >= 1.
      cut_factor: factor on the rates at each rollback, in (0, 1]; 1 leaves them alone.
      axis_name: the mapped axis, or axes, over which losses are averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params`` and ``value``. Its
      state holds one copy of the parameters and of the inner state. Make it the outermost transformation: a
      transformation behind it would change the restoring updates. Apply it to the full parameter tree, not
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
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> RollbackState:
        inner_state = inner.init(params)
        return RollbackState(
            monitor=empty_monitor(),
            window=empty_window(),
            snapshot=_snapshot.take_snapshot(params, inner_state),
            restore_steps_left=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
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
        _snapshot.check_params("with_rollback", params)
        extra_args |= {"value": value, "has_value": has_value}
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        loss, observed = _observe.read_loss(
            "with_rollback", value, has_value, state.monitor.baseline.dtype, axis_name
        )

        restoring = state.restore_steps_left > 0
        is_dead = _is_zero(updates) & (loss > state.monitor.baseline)
        monitor, restore = observe_loss(state.monitor, loss, ~jnp.isfinite(loss) | is_dead, patience)
        losses = observe(state.window, loss)
        is_full = losses.steps >= jnp.asarray(window, loss.dtype)
        save = is_full & is_improvement(monitor, losses.mean) & ~restore
        monitor = _numerics.select(save, monitor_from(losses.mean, variance(losses)), monitor)
        losses = _numerics.select(is_full | restore, empty_window(), losses)

        restore, save = observed & restore & ~restoring, observed & save
        steps, inner_state, snapshot, restores = _snapshot.save_or_restore(
            _snapshot.drop_non_finite(steps, params),
            inner_state,
            state.snapshot,
            params=params,
            previous_inner_state=state.inner_state,
            needed=restore | restoring | save,
            restore=restore,
            restoring=restoring,
            save=save,
        )
        starts = restores & ~restoring
        # A loss while restoring belongs to the diverged parameters and is ignored.
        counts = observed & (starts | ~restores)
        left = jnp.where(starts, _snapshot.RESTORE_STEPS, state.restore_steps_left) - 1
        factor = jnp.where(starts, cut_factor, 1)
        return steps, RollbackState(
            monitor=_numerics.select(counts, monitor, state.monitor),
            window=_numerics.select(counts, losses, state.window),
            snapshot=snapshot,
            restore_steps_left=jnp.where(restores, left, 0).astype(jnp.int32),
            num_rollbacks=state.num_rollbacks + starts.astype(jnp.int32),
            inner_state=_cut_rates(inner_state, state.inner_state, restores, factor),
        )

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


def _is_zero(updates: optax.Updates) -> jax.Array:
    """Whether there are gradients, and all of them are zero."""
    leaves = [leaf for leaf in jax.tree.leaves(updates) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return ~jnp.any(jnp.array([jnp.any(leaf != 0) for leaf in leaves])) if leaves else jnp.asarray(False)


def _cut_rates(
    inner_state: optax.OptState, latest: optax.OptState, restores: jax.Array, factor: jax.Array
) -> optax.OptState:
    """While restoring, the minimum of each rate in the restored and the latest state, times ``factor``."""

    def cut(restored: Any, last: Any) -> Any:
        def lower(restored: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.where(restores, jnp.minimum(restored, last) * factor.astype(restored.dtype), restored)

        return _rule.map_rates(lower, restored, last)

    return jax.tree.map(cut, inner_state, latest, is_leaf=_rule.is_rate_state)
