"""GreedyLR, zeroth order: raise the learning rate after steady improvement, cut it after steady decay.

Papers: S. Subramanian and V. Ganapathiraman, "Zeroth Order GreedyLR: An Adaptive Learning Rate Scheduler
for Deep Neural Network Training", Algorithm 1; and the same authors' "Dynamic Learning Rate Scheduling
based on Loss Changes Leads to Faster Convergence".

Two algorithms carry this name, and they are different controllers:

* ``"reference"``, the published implementation (``transformers.optimization.GreedyLR``): after an
  increase nothing is decided for ``warmup`` observations, after a decrease for ``cooldown``; every
  change of rate restarts the counts.
* ``"paper"``, Algorithm 1 line by line: the cooldown and warmup counters run all the time, and a change
  of rate does not restart the counts, so that a long run of good epochs raises the rate at every
  further epoch. Taken literally, a cooldown > 0 with patience >= 1 means that the rate never rises, and
  a warmup > 0 with patience >= 1 that it never falls.

Departures from the published implementation, on purpose:

* The mean comes from the last ``window`` losses alone, by sums of eight of them, of which one is computed
  anew at each loss; a running sum would keep one NaN for good.
* A relative threshold is a margin of ``threshold * abs(best)`` on the better side for every sign of the
  loss; ``best * (1 - threshold)`` puts it on the worse side below zero.
* A non-finite loss counts as worse, and enters neither the mean nor the best value.
* An initial rate outside its bounds is an error where the values are known; it does not drift back.
* An increase multiplies by the reciprocal of the factor, see ``_inverse``.
"""

import itertools
from collections.abc import Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _rule

_CHANGED = _checks.INT32_MAX  # of a streak, see GreedyLRState
_LONGEST = _CHANGED - 1
_BLOCK = 8  # losses of the window whose sum is kept


class GreedyLRState(NamedTuple):
    """State of the GreedyLR rule. The names of the counts are those of Algorithm 1.

    Of ``num_good`` and ``num_bad`` one is always zero, so one number stands for both. Where a change of rate
    restarts the counts it says so, and counts as zero from then on: so the best value and the scale follow
    from it alone, and XLA updates all three in place. On a small problem each scalar that has to be copied
    shows in the time of a step.
    """

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    best_value: jax.Array  # shape=(), dtype=float; best (smoothed) value so far
    streak: jax.Array  # shape=(), dtype=int32; improvements in a row; below zero: observations without one;
    # _CHANGED or its negative: the rate was to be raised or cut, and the counts are zero again
    cooldown_count: jax.Array  # shape=(), dtype=int32
    warmup_count: jax.Array  # shape=(), dtype=int32
    reset_countdown: jax.Array  # shape=(), dtype=int32; decreases at the minimum until a reset
    num_observations: jax.Array  # shape=(), dtype=int32; since the last restart, where reset_after is set
    initial_scale: jax.Array  # shape=(), dtype=float; where a reset goes back to
    history: jax.Array  # shape=(window,), dtype=float; ring of the last finite values
    history_sums: jax.Array  # shape=(window // 8 or 1,), dtype=float; of eight of them each
    history_count: (
        jax.Array
    )  # shape=(), dtype=int32; values entered, modulo the window once full; 0: none counts

    @property
    def num_good(self) -> jax.Array:
        """Improvements in a row; shape=(), dtype=int32."""
        return jnp.maximum(_counted(self.streak), 0)

    @property
    def num_bad(self) -> jax.Array:
        """Observations without improvement in a row; shape=(), dtype=int32."""
        return jnp.maximum(-_counted(self.streak), 0)

    def readings(self) -> dict[str, jax.Array]:
        """What :func:`greedylr_jax.metrics` shows: the counts in place of the streak."""
        readings = self._asdict()
        del readings["streak"]
        return readings | {"num_good": self.num_good, "num_bad": self.num_bad}


class _Settings(NamedTuple):
    """Hyperparameters of the rule. Numbers may be traced; a bool or int is static."""

    factor: ArrayLike
    patience: ArrayLike
    threshold: ArrayLike
    relative: bool
    cooldown: ArrayLike
    warmup: ArrayLike
    min_scale: ArrayLike
    max_scale: ArrayLike
    window: int
    reset_at_min: ArrayLike | None
    reset_after: ArrayLike | None
    sign: int  # 1: lower is better, -1: higher is better
    eps: ArrayLike


def greedy_lr(
    factor: ArrayLike = 0.95,
    patience: ArrayLike = 10,
    *,
    threshold: ArrayLike = 1e-6,
    threshold_mode: Literal["abs", "rel"] = "abs",
    cooldown: ArrayLike = 0,
    warmup: ArrayLike = 0,
    min_scale: ArrayLike = 0.1,
    max_scale: ArrayLike = 10.0,
    window: int | None = 50,
    reset_at_min: ArrayLike | None = None,
    reset_after: ArrayLike | None = None,
    mode: Literal["min", "max"] = "min",
    eps: ArrayLike = 0.0,
    algorithm: Literal["reference", "paper"] = "reference",
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """GreedyLR: multiplies the updates by a scale that follows the training loss.

    The scale starts at 1. When the (smoothed) loss has improved on its best value more than ``patience``
    times in a row it is divided by ``factor``; when it has failed to for more than ``patience`` times in
    a row it is multiplied by ``factor``; it stays in ``[min_scale, max_scale]``. The effective learning
    rate is the optimizer's own (a constant or any schedule) times the scale. The defaults are the
    paper's published settings.

    Put it *after* the optimizer, or anywhere in :func:`greedylr_jax.chain`, and hand the loss to
    ``update``. All numeric hyperparameters but ``window`` may be traced, so that many settings train
    under one ``jax.vmap`` and one compilation; bounds are checked where values are known.

    Args:
      factor: the rate is divided or multiplied by it; in (0, 1).
      patience: how many observations in a row are tolerated before the rate changes, at the next one;
        an integer >= 0.
      threshold: how much better than the best value a loss must be to count as an improvement; >= 0.
      threshold_mode: ``"abs"``: in the loss's own units; ``"rel"``: as a fraction of ``abs(best)``.
      cooldown: observations for which nothing is decided after a decrease; an integer >= 0. With
        ``algorithm="paper"`` a counter that runs all the time, see the module's docstring.
      warmup: the same after an increase.
      min_scale: lowest scale, in [0, 1]; 0 stands for the smallest normal number, as no rate rises from 0.
      max_scale: highest scale, in [1, inf).
      window: number of losses in the running mean, a Python integer >= 1; None (or 1): no smoothing.
      reset_at_min: back to the initial state once the scale was to be lowered this many times while at
        its minimum, with no increase in between; an integer >= 1, or None: never. Not in Algorithm 1.
      reset_after: back to the start at every observation that exceeds this number since the last
        restart (so every ``reset_after + 1`` observations); an integer >= 1, or None: never. With
        ``algorithm="paper"`` the best value and the cooldown and warmup counters survive (lines 32-39).
      mode: ``"min"``: lower values are better; ``"max"``: higher ones (an accuracy, a reward).
      eps: changes of the scale that are not larger than this are not made; >= 0. Not in Algorithm 1.
      algorithm: ``"reference"``, the published implementation, or ``"paper"``, Algorithm 1.
      every: decide on the mean of this many losses, an integer >= 1.
      axis_name: mapped axis, or axes, over which the loss is averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`: call
      ``update(updates, state, params, value=loss)``.

    Raises:
      ValueError: if a hyperparameter is out of its range; the message names it, its value and the range.
        ``update`` raises ``TypeError`` or ``ValueError`` if ``value`` is missing or not a scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import get_scale, greedy_lr
      >>> tx = optax.chain(optax.adamw(1e-2), greedy_lr(factor=0.5, patience=1, window=None))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(4):
      ...     params, state = step(params, state)
      >>> print(get_scale(state))  # two improvements in a row, twice
      4.0

    Source: Algorithm 1 and Sections II and III of "Zeroth Order GreedyLR"; the class ``GreedyLR`` of
    ``transformers.optimization`` (5.x).
    """
    rule = _greedy_rule(
        factor,
        patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        warmup=warmup,
        bounds=(("min_scale", min_scale), ("max_scale", max_scale)),
        initial=("the initial scale", 1.0),
        window=window,
        reset_at_min=reset_at_min,
        reset_after=reset_after,
        mode=mode,
        eps=eps,
        algorithm=algorithm,
    )
    return _rule.scale_by_rule(rule, every=every, axis_name=axis_name)


def greedy_lr_schedule(
    init_value: ArrayLike,
    *,
    min_value: ArrayLike,
    max_value: ArrayLike,
    factor: ArrayLike = 0.95,
    patience: ArrayLike = 10,
    threshold: ArrayLike = 1e-6,
    threshold_mode: Literal["abs", "rel"] = "abs",
    cooldown: ArrayLike = 0,
    warmup: ArrayLike = 0,
    window: int | None = 50,
    reset_at_min: ArrayLike | None = None,
    reset_after: ArrayLike | None = None,
    mode: Literal["min", "max"] = "min",
    eps: ArrayLike = 0.0,
    algorithm: Literal["reference", "paper"] = "reference",
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """GreedyLR as an Optax stateful schedule, in absolute learning rates.

    Use it with ``optax.inject_hyperparams``, and read the current rate from
    ``opt_state.hyperparams["learning_rate"]``. It works in absolute rates and so reproduces the published
    implementation number for number.

    Args:
      init_value: the initial learning rate, > 0.
      min_value: lowest learning rate, in [0, init_value]; 0 as in :func:`greedy_lr`.
      max_value: highest learning rate, >= init_value, finite.
      factor, patience, threshold, threshold_mode, cooldown, warmup, window, reset_at_min, reset_after,
      mode, algorithm, every, axis_name: as in :func:`greedy_lr`.
      eps: changes of the learning rate that are not larger than this are not made; >= 0.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: if a hyperparameter is out of its range, or ``init_value`` outside its bounds.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import greedy_lr_schedule
      >>> schedule = greedy_lr_schedule(0.25, min_value=0.025, max_value=1.0, factor=0.5, patience=0)
      >>> tx = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=2.0)
      >>> print(state.hyperparams["learning_rate"])
      0.5

      By hand:

      >>> state = schedule.init()
      >>> state = schedule.update(state, value=2.0)
      >>> print(schedule(state), schedule(state, value=1.0), schedule(state, value=3.0))
      0.5 1.0 0.25

    Source: as :func:`greedy_lr`.
    """
    rule = _greedy_rule(
        factor,
        patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        warmup=warmup,
        bounds=(("min_value", min_value), ("max_value", max_value)),
        initial=("init_value", init_value),
        window=window,
        reset_at_min=reset_at_min,
        reset_after=reset_after,
        mode=mode,
        eps=eps,
        algorithm=algorithm,
    )
    return _rule.schedule_by_rule(rule, init_value, every=every, axis_name=axis_name)


def _greedy_rule(
    factor: ArrayLike,
    patience: ArrayLike,
    *,
    threshold: ArrayLike,
    threshold_mode: str,
    cooldown: ArrayLike,
    warmup: ArrayLike,
    bounds: tuple[tuple[str, ArrayLike], tuple[str, ArrayLike]],
    initial: tuple[str, ArrayLike],
    window: int | None,
    reset_at_min: ArrayLike | None,
    reset_after: ArrayLike | None,
    mode: Literal["min", "max"],
    eps: ArrayLike,
    algorithm: Literal["reference", "paper"],
) -> _rule.Rule:
    """Checks the hyperparameters and builds the rule. Bounds and start come with the user's names."""
    real, integer = _checks.check_real, _checks.check_integer
    (min_name, min_scale), (max_name, max_scale) = bounds
    settings = _Settings(
        factor=real("factor", factor, low=0.0, high=1.0, low_open=True, high_open=True),
        patience=integer("patience", patience),
        threshold=real("threshold", threshold, low=0.0, high_open=True),
        relative=_checks.check_choice("threshold_mode", threshold_mode, ("abs", "rel")) == "rel",
        cooldown=integer("cooldown", cooldown),
        warmup=integer("warmup", warmup),
        min_scale=real(min_name, min_scale, low=0.0, high_open=True),
        max_scale=real(max_name, max_scale, low=0.0, low_open=True, high_open=True),
        window=1 if window is None else _checks.check_static_integer("window", window),
        reset_at_min=None if reset_at_min is None else integer("reset_at_min", reset_at_min, low=1),
        reset_after=None if reset_after is None else integer("reset_after", reset_after, low=1),
        sign=1 if _checks.check_choice("mode", mode, ("min", "max")) == "min" else -1,
        eps=real("eps", eps, low=0.0, high_open=True),
    )
    start = real(*initial, low=0.0, low_open=True, high_open=True)
    _checks.check_order(min_name, settings.min_scale, max_name, settings.max_scale)
    _checks.check_order(min_name, settings.min_scale, initial[0], start)
    _checks.check_order(initial[0], start, max_name, settings.max_scale)
    _checks.check_choice("algorithm", algorithm, ("reference", "paper"))
    if algorithm == "paper" and settings.reset_at_min is not None:
        raise ValueError(
            f"reset_at_min must be None with algorithm='paper', got {reset_at_min!r}: Algorithm 1 "
            "resets by count (reset_after)."
        )
    if algorithm == "paper" and not _is_zero(settings.eps):
        raise ValueError(f"eps must be 0 with algorithm='paper', got {eps!r}: Algorithm 1 has no such bound.")
    step = _reference_step if algorithm == "reference" else _paper_step

    def init(scale: jax.Array) -> GreedyLRState:
        return _initial_state(settings, scale)

    def update(state: GreedyLRState, value: jax.Array) -> GreedyLRState:
        return step(_as_arrays(settings, state.scale.dtype), state, value)

    return _rule.Rule(init, update, name="greedy_lr")


def _as_arrays(settings: _Settings, dtype: jnp.dtype) -> _Settings:
    """The settings with numbers in the dtypes of the state: floats as ``dtype``, counts as int32."""

    def real(value: ArrayLike) -> ArrayLike:
        return _cast(value, dtype)

    def count(value: ArrayLike | None) -> ArrayLike | None:
        return None if value is None else _cast(value, jnp.int32)

    return settings._replace(
        factor=real(settings.factor),
        patience=count(settings.patience),
        threshold=real(settings.threshold),
        cooldown=count(settings.cooldown),
        warmup=count(settings.warmup),
        min_scale=_at_least_tiny(real(settings.min_scale)),
        max_scale=real(settings.max_scale),
        reset_at_min=count(settings.reset_at_min),
        reset_after=count(settings.reset_after),
        eps=real(settings.eps),
    )


def _at_least_tiny(value: ArrayLike) -> ArrayLike:
    """The smallest normal number instead of 0: from 0, or from what flushes to 0, no rate could rise."""
    tiny = np.asarray(np.finfo(value.dtype).tiny)[()]
    return jnp.maximum(value, tiny) if isinstance(value, jax.Array) else np.maximum(value, tiny)


def _cast(value: ArrayLike, dtype: jnp.dtype) -> ArrayLike:
    # A known number stays a NumPy scalar: it becomes a literal of the compiled program, and nothing
    # is sent to the device for it.
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return np.asarray(value, dtype)[()]


def _initial_state(settings: _Settings, scale: jax.Array) -> GreedyLRState:
    """The state before the first observation (Algorithm 1, line 2)."""
    dtype = scale.dtype

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return GreedyLRState(
        scale=scale,
        best_value=jnp.full((), settings.sign * jnp.inf, dtype),
        streak=zero(),
        cooldown_count=zero(),
        warmup_count=zero(),
        reset_countdown=jnp.array(0 if settings.reset_at_min is None else settings.reset_at_min, jnp.int32),
        num_observations=zero(),
        initial_scale=jnp.array(scale, copy=True),
        history=jnp.zeros((settings.window,), dtype),
        history_sums=jnp.zeros((settings.window // _BLOCK or 1,), dtype),
        history_count=zero(),
    )


def _restarted(settings: _Settings, state: GreedyLRState) -> GreedyLRState:
    """The state before the first observation again, but for the ring, which counts as empty.

    To empty it here would let a decision that comes of its mean write the whole ring once more, at every
    step: under ``lax.scan`` that took many times as long as all the rest.
    """
    return _initial_state(settings, state.initial_scale)._replace(
        history=state.history, history_sums=state.history_sums
    )


def _smooth(
    settings: _Settings, state: GreedyLRState, value: jax.Array
) -> tuple[GreedyLRState, jax.Array, jax.Array]:
    """Enters a value into the window (line 4).

    Returns:
      The new state, the mean over the window, and whether value and mean are usable (finite; the sum of
      huge losses may overflow).
    """
    usable = jnp.isfinite(value)
    window = settings.window
    if window == 1:  # no smoothing; the slot is there because checkpoints take no empty arrays
        return state, value, usable
    # While the ring fills the count is its length; once full it runs from `window` to `2 * window - 1`,
    # so that one number tells both the length and the slot of the next value, and never overflows.
    # Unsigned, as JAX otherwise asks of each index whether it is negative.
    count = state.history_count.astype(jnp.uint32)
    slot = jnp.minimum(count, count - window)  # what is below zero wraps, and is the larger one
    count = count + usable.astype(jnp.uint32)
    count = _numerics.where(count == 2 * window, window, count)
    length = jnp.minimum(jnp.maximum(count, 1), window)  # 1: nothing but non-finite values so far
    state = _enter(settings, state, value, usable, slot, length)
    # The sums of all whole blocks, and the losses behind them.
    blocks = window // _BLOCK
    starts = [*range(0, blocks * _BLOCK, _BLOCK), *range(blocks * _BLOCK, window)]
    parts = jnp.concatenate([state.history_sums[:blocks], state.history[blocks * _BLOCK :]])
    parts = _without_stale(settings, parts, np.array(starts, np.uint32), length)
    mean = _sum(parts) / length.astype(parts.dtype)
    state = state._replace(history_count=count.astype(jnp.int32))
    return state, mean, usable & jnp.isfinite(mean)


def _enter(
    settings: _Settings,
    state: GreedyLRState,
    value: jax.Array,
    usable: jax.Array,
    slot: jax.Array,
    length: jax.Array,
) -> GreedyLRState:
    """Writes a usable value into a slot of the ring, and the sum of the block that this slot is in.

    The other blocks' sums still hold, so that a mean over fifty takes as many additions as one over fifteen;
    and as no sum is ever carried on from one value to the next, rounding does not add up.
    """
    oldest = jax.lax.dynamic_slice(state.history, (slot,), (1,))
    entered = _numerics.where(usable, value.reshape(1), oldest)
    state = state._replace(history=jax.lax.dynamic_update_slice(state.history, entered, (slot,)))
    blocks = settings.window // _BLOCK
    if not blocks:
        return state
    # Of a slot behind the blocks the last block is summed again.
    number = jnp.minimum(jax.lax.div(slot, np.uint32(_BLOCK)), blocks - 1)
    start = number * _BLOCK
    block = jax.lax.dynamic_slice(state.history, (start,), (_BLOCK,))
    block = _without_stale(settings, block, start + jnp.arange(_BLOCK, dtype=slot.dtype), length)
    sums = jax.lax.dynamic_update_slice(state.history_sums, _sum(block)[None], (number,))
    return state._replace(history_sums=sums)


def _without_stale(settings: _Settings, values: jax.Array, places: jax.Array, length: jax.Array) -> jax.Array:
    """The values with zeros for those from before a restart, which leaves them in the ring."""
    if settings.reset_at_min is None and settings.reset_after is None:
        return values
    return jnp.where(places < length, values, 0)


def _sum(values: jax.Array) -> jax.Array:
    """The sum of a vector, of a short one by pairs.

    In ``jnp.sum`` on a CPU each addition waits for the one before.
    """
    if values.size > 3 * _BLOCK:  # would be a long program
        return jnp.sum(values)
    terms = [*values]
    while len(terms) > 1:
        pairs = list(itertools.zip_longest(terms[::2], terms[1::2]))
        terms = [left if right is None else left + right for left, right in pairs]
    return terms[0]


def _improves(settings: _Settings, state: GreedyLRState, mean: jax.Array) -> jax.Array:
    """Whether ``mean`` beats the best value by more than the threshold (line 6)."""
    best = settings.sign * state.best_value
    # Before the first improvement the best value is infinite, and every finite value beats it.
    if settings.relative:
        known = _numerics.where(jnp.isfinite(best), best, 0)
        bound = known * _numerics.where(known < 0, 1 + settings.threshold, 1 - settings.threshold)
        bound = _numerics.where(jnp.isfinite(best), bound, best)
    else:
        bound = best - settings.threshold
    return settings.sign * mean < bound


def _inverse(factor: ArrayLike) -> ArrayLike:
    """The reciprocal of the factor, rounded once to its dtype.

    XLA turns a division into a product with the reciprocal where it sees a constant or a broadcast
    divisor and keeps it elsewhere, so the same run would differ in its last bit between a constant and
    a traced factor, or between a loop and a map. Asking for the product makes all of them agree.
    """
    return np.ones((), factor.dtype)[()] / factor


def _increment(count: jax.Array) -> jax.Array:
    return jnp.minimum(count, _checks.INT32_MAX - 1) + 1


def _counted(streak: jax.Array) -> jax.Array:
    """The streak as the counts know it."""
    return _numerics.where(jnp.abs(streak) == _CHANGED, 0, streak)


def _prolong(streak: jax.Array, better: jax.Array) -> jax.Array:
    """Counts an observation as an improvement or as none (lines 6-13); either ends the other's count."""
    return _numerics.where(better, jnp.maximum(streak, 0) + 1, jnp.minimum(streak, 0) - 1)


def _saturated(streak: jax.Array) -> jax.Array:
    """The streak, kept from what marks a change of rate."""
    return jnp.clip(streak, -_LONGEST, _LONGEST)


def _is_zero(value: ArrayLike) -> bool:
    return not _checks.is_traced(value) and value == 0


def _count_down(settings: _Settings, state: GreedyLRState) -> tuple[GreedyLRState, jax.Array | bool]:
    """Runs a cooldown or else a warmup down by one; returns whether one was running.

    A hold that is never started is left out of the program: on small problems each scalar that a step
    writes costs as much as a part of the optimizer.
    """
    holding = False
    for name in ("cooldown", "warmup"):  # never both positive
        if _is_zero(getattr(settings, name)):
            continue
        count = getattr(state, f"{name}_count")
        running = count > 0
        state = state._replace(**{f"{name}_count": count - running.astype(jnp.int32)})
        holding = holding | running
    return state, holding


def _reference_step(settings: _Settings, state: GreedyLRState, value: jax.Array) -> GreedyLRState:
    """One observation by the published implementation."""
    state, mean, usable = _smooth(settings, state, value)

    state, holding = _count_down(settings, state)
    deciding = jnp.logical_not(holding)
    better = deciding & usable & _improves(settings, state, mean)
    streak = _prolong(_counted(state.streak), better)
    if _checks.is_traced(settings.patience) or settings.patience >= _LONGEST:
        streak = _saturated(streak)  # otherwise a change of rate ends it before
    streak = _numerics.where(deciding, streak, 0)
    streak = _numerics.where(streak > settings.patience, _CHANGED, streak)
    streak = _numerics.where(streak < -settings.patience, -_CHANGED, streak)
    best_value = _numerics.where(streak > 0, mean, state.best_value)

    increase, decrease = streak == _CHANGED, streak == -_CHANGED
    raised = jnp.minimum(state.scale * _inverse(settings.factor), settings.max_scale)
    lowered = jnp.maximum(state.scale * settings.factor, settings.min_scale)
    if _is_zero(settings.eps):
        raised, lowered = jnp.maximum(raised, state.scale), jnp.minimum(lowered, state.scale)
    else:
        raised = _numerics.where(raised - state.scale > settings.eps, raised, state.scale)
        lowered = _numerics.where(state.scale - lowered > settings.eps, lowered, state.scale)
    scale = _numerics.where(increase, raised, _numerics.where(decrease, lowered, state.scale))

    stepped = state._replace(scale=scale, best_value=best_value, streak=streak)
    if settings.reset_after is not None:
        stepped = stepped._replace(num_observations=_increment(state.num_observations))
    if not _is_zero(settings.cooldown):
        count = _numerics.where(decrease, settings.cooldown, state.cooldown_count)
        stepped = stepped._replace(cooldown_count=count)
    if not _is_zero(settings.warmup):
        count = _numerics.where(increase, settings.warmup, state.warmup_count)
        stepped = stepped._replace(warmup_count=count)
    if settings.reset_at_min is not None:
        at_min = decrease & (scale <= settings.min_scale)
        remaining = state.reset_countdown - at_min.astype(jnp.int32)
        countdown = _numerics.where(increase, settings.reset_at_min, remaining)
        # The reset is part of the decrease, which goes on to start its cooldown.
        restarted = _restarted(settings, stepped)._replace(cooldown_count=stepped.cooldown_count)
        stepped = stepped._replace(reset_countdown=countdown)
        stepped = _numerics.select(at_min & (countdown <= 0), restarted, stepped)
    if settings.reset_after is not None:
        due = stepped.num_observations > settings.reset_after
        stepped = _numerics.select(due, _restarted(settings, stepped), stepped)
    return stepped


def _paper_step(settings: _Settings, state: GreedyLRState, value: jax.Array) -> GreedyLRState:
    """One epoch of Algorithm 1, lines 3 to 40."""
    state, mean, usable = _smooth(settings, state, value)  # line 4

    better = usable & _improves(settings, state, mean)  # lines 6-13
    best_value = _numerics.where(better, mean, state.best_value)
    streak = _saturated(_prolong(state.streak, better))

    cooling = state.cooldown_count < settings.cooldown  # lines 14-19
    cooldown_count = _numerics.where(cooling, state.cooldown_count + 1, 0)
    streak = _numerics.where(cooling, jnp.minimum(streak, 0), streak)  # num_good = 0

    warming = state.warmup_count < settings.warmup  # lines 20-25
    warmup_count = _numerics.where(warming, state.warmup_count + 1, 0)
    streak = _numerics.where(warming, jnp.maximum(streak, 0), streak)  # num_bad = 0

    scale = state.scale
    raised = scale * _inverse(settings.factor)
    scale = _numerics.where(streak > settings.patience, raised, scale)  # lines 26-28
    scale = _numerics.where(streak < -settings.patience, scale * settings.factor, scale)  # lines 29-31

    stepped = state._replace(
        scale=scale,
        best_value=best_value,
        streak=streak,
        cooldown_count=cooldown_count,
        warmup_count=warmup_count,
        num_observations=_increment(state.num_observations),
    )
    if settings.reset_after is not None:  # lines 32-39
        restarted = _restarted(settings, stepped)._replace(
            best_value=best_value, cooldown_count=cooldown_count, warmup_count=warmup_count
        )
        due = stepped.num_observations > settings.reset_after
        stepped = _numerics.select(due, restarted, stepped)
    within = jnp.clip(stepped.scale, settings.min_scale, settings.max_scale)  # line 40
    return stepped._replace(scale=within)
