"""GreedyLR (zeroth order): raises the learning rate after steady improvement, lowers it after steady decay.

Papers: S. Subramanian and V. Ganapathiraman, "Zeroth Order GreedyLR: An Adaptive Learning Rate Scheduler
for Deep Neural Network Training", Algorithm 1; and the same authors' "Dynamic Learning Rate Scheduling
based on Loss Changes Leads to Faster Convergence".

Two different algorithms are published under this name:

* ``"reference"``, the published implementation (``transformers.optimization.GreedyLR``): an increase is
  followed by ``warmup`` observations without a decision, a decrease by ``cooldown`` observations; every
  change of the rate resets the counts of good and bad observations.
* ``"paper"``, Algorithm 1 line by line: the cooldown and warmup counters run all the time, and a change
  of the rate does not reset the counts, so that a long run of good epochs raises the rate at every
  further epoch. Taken literally, a cooldown > 0 with patience >= 1 means that the rate never rises, and
  a warmup > 0 with patience >= 1 that it never falls. One line is not taken literally: line 32 resets
  where ``epochs > reset`` and no line restarts ``epochs``, so that every epoch after number ``reset``
  would restore the initial rate, and nothing would adapt any more. Here a reset restarts this count, as
  the text of Section II.4 suggests ("after a particular epoch"): one reset every ``reset_after + 1``
  observations.

Departures from the published implementation:

* The mean over ``window`` losses is computed from the losses in the window (:mod:`greedylr_jax._ring`); a
  running sum would stay NaN after one NaN.
* A relative threshold is a margin of ``threshold * abs(best)`` on the better side, whatever the sign of the
  loss; ``best * (1 - threshold)`` is on the worse side if ``best`` is negative.
* A non-finite loss counts as worse, and enters neither the mean nor the best value.
* An initial rate outside its bounds is an error where the values are known. A rate outside its bounds
  (traced, or restored from a checkpoint) is clipped at the next observation; it does not drift back.
* An increase multiplies by the reciprocal of the factor, see ``_inverse``.
"""

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from greedylr_jax import _checks, _deprecated, _numerics, _ring, _rule

# Decisions. Positive: the observation is an improvement; negative: it is not.
INCREASE = 2
BETTER = 1
HOLD = 0  # no decision during a cooldown or warmup
WORSE = -1
DECREASE = -2


class GreedyLRState(NamedTuple):
    """State of the GreedyLR rule; the names of the counts are those of Algorithm 1."""

    scale: jax.Array  # shape=(), dtype=float; the multiplier, or in a schedule the learning rate
    best_value: jax.Array  # shape=(), dtype=float; best (smoothed) value so far
    num_good: jax.Array  # shape=(), dtype=int32; consecutive improvements
    num_bad: jax.Array  # shape=(), dtype=int32; consecutive observations without improvement
    decision: jax.Array  # shape=(), dtype=int32; on the last observation, one of the constants above
    cooldown_count: jax.Array  # shape=(), dtype=int32
    warmup_count: jax.Array  # shape=(), dtype=int32
    reset_countdown: jax.Array  # shape=(), dtype=int32; decreases at the minimum until a reset
    num_observations: jax.Array  # shape=(), dtype=int32; since the last reset; counted if reset_after is set
    initial_scale: jax.Array  # shape=(), dtype=float; the scale after a reset
    history: _ring.Ring  # the last `window` finite values


class _Settings(NamedTuple):
    """Arguments of :func:`greedy_lr` that define the rule. Numbers may be traced; ``window`` is static."""

    factor: ArrayLike
    patience: ArrayLike
    threshold: ArrayLike
    threshold_mode: str
    cooldown: ArrayLike
    warmup: ArrayLike
    min_scale: ArrayLike
    max_scale: ArrayLike
    window: int | None
    reset_at_min: ArrayLike | None
    reset_after: ArrayLike | None
    mode: str
    eps: ArrayLike
    algorithm: str
    only_decrease: bool

    @property
    def sign(self) -> int:
        """1 if lower values are better, -1 if higher ones are."""
        return 1 if self.mode == "min" else -1


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
    only_decrease: bool = False,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """GreedyLR: multiplies the updates by a scale that adapts to the training loss.

    The scale starts at 1. After more than ``patience`` consecutive improvements of the (smoothed) loss on
    its best value the scale is divided by ``factor``; after more than ``patience`` consecutive observations
    without improvement it is multiplied by ``factor``. It stays in ``[min_scale, max_scale]``. The effective
    learning rate is that of the optimizer (a constant or any schedule) times the scale. The defaults of
    ``patience``, ``window`` and ``min_scale`` are the paper's, those of ``factor`` and ``threshold`` are of
    the published code, and that of ``max_scale`` is ours.

    Put it *after* the optimizer, or anywhere in :func:`greedylr_jax.chain`, and pass the loss to
    ``update``. All numeric hyperparameters but ``window`` may be traced, so that many settings train
    under one ``jax.vmap`` and one compilation; bounds are checked if the values are known.

    Args:
      factor: divides or multiplies the scale; in (0, 1).
      patience: number of consecutive good or bad observations after which the next one changes the scale;
        an integer >= 0.
      threshold: minimum improvement on the best value, >= 0.
      threshold_mode: ``"abs"``: ``threshold`` is in units of the loss; ``"rel"``: it is a fraction of
        ``abs(best)``.
      cooldown: number of observations after a decrease during which no decision is made; an integer >= 0.
        With ``algorithm="paper"`` a counter that runs all the time, see the module's docstring.
      warmup: the same after an increase.
      min_scale: minimum scale, in [0, 1]; 0 means the smallest normal number, since 0 could not increase.
      max_scale: maximum scale, in [1, inf).
      window: number of losses in the running mean, a Python integer >= 1; None or 1: no smoothing.
      reset_at_min: number of decreases at the minimum scale, without an increase in between, after which
        the initial state is restored; an integer >= 1, or None: never. Not in Algorithm 1.
      reset_after: number of observations since the last reset after which the next one restores the
        initial state (a reset every ``reset_after + 1`` observations); an integer >= 1, or None: never. With
        ``algorithm="paper"`` the best value and the cooldown and warmup counters are kept (lines 32-39).
      mode: ``"min"``: lower values are better; ``"max"``: higher values are (an accuracy, a reward).
      eps: minimum change of the scale; a change must be larger to be made; >= 0. Not in Algorithm 1.
      algorithm: ``"reference"``, the published implementation, or ``"paper"``, Algorithm 1.
      only_decrease: if True the scale never rises, as in ReduceLROnPlateau; see below. A Python bool.
      every: number of losses whose mean is one observation, an integer >= 1.
      axis_name: mapped axis, or axes, over which the loss is averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`: call
      ``update(updates, state, params, value=loss)``.

    With ``only_decrease=True`` the rule is ReduceLROnPlateau with a smoothed loss: improvements are counted,
    but raise nothing, and ``max_scale`` and ``warmup`` have no effect (in Algorithm 1, ``warmup`` still
    delays decreases). ``max_scale=1`` is not the same: the scale rises back to 1 after a decrease. The
    decrease comes at bad observation number ``patience + 1`` as in PyTorch, and at number ``patience`` in
    Optax and Keras: ``patience=9`` here is ``patience=10`` there. With ``window=None`` and ``cooldown=0``
    the scales equal those of ``optax.contrib.reduce_on_plateau`` with the same factor, threshold and bounds.
    During a cooldown the best value is not updated here, but is there.

    Raises:
      ValueError: if a hyperparameter is out of range. ``update`` raises ``TypeError`` or ``ValueError`` if
        ``value`` is missing or not a scalar.

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
    settings = _Settings(
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        warmup=warmup,
        min_scale=min_scale,
        max_scale=max_scale,
        window=window,
        reset_at_min=reset_at_min,
        reset_after=reset_after,
        mode=mode,
        eps=eps,
        algorithm=algorithm,
        only_decrease=only_decrease,
    )
    rule = _greedy_rule(_check(settings, 1.0, names=("min_scale", "the initial scale", "max_scale")))
    return _rule.scale_by_rule(rule, every=every, axis_name=axis_name)


@_deprecated.renamed_arguments(min_value="min_learning_rate", max_value="max_learning_rate")
def greedy_lr_schedule(
    init_value: ArrayLike,
    *,
    min_learning_rate: ArrayLike,
    max_learning_rate: ArrayLike,
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
    only_decrease: bool = False,
    every: ArrayLike = 1,
    axis_name: Hashable | None = None,
) -> _rule.RuleSchedule:
    """GreedyLR as an Optax stateful schedule, in absolute learning rates.

    Use it with ``optax.inject_hyperparams``, and read the current rate from
    ``opt_state.hyperparams["learning_rate"]``. The rates equal those of the published
    implementation exactly.

    Args:
      init_value: the initial learning rate, > 0.
      min_learning_rate: minimum, in [0, ``init_value``]; 0 means the smallest normal number.
      max_learning_rate: maximum, in [``init_value``, inf).
      factor, patience, threshold, threshold_mode, cooldown, warmup: as in :func:`greedy_lr`.
      window, reset_at_min, reset_after, mode, algorithm, only_decrease, every, axis_name: as in
        :func:`greedy_lr`.
      eps: minimum change of the learning rate; a change must be larger to be made; >= 0.

    Returns:
      A stateful schedule, see :func:`greedylr_jax.schedule_by_rule`.

    Raises:
      ValueError: if a hyperparameter is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import greedy_lr_schedule
      >>> schedule = greedy_lr_schedule(
      ...     0.25, min_learning_rate=0.025, max_learning_rate=1.0, factor=0.5, patience=0)
      >>> tx = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=2.0)
      >>> print(state.hyperparams["learning_rate"])
      0.5

      Without an optimizer:

      >>> state = schedule.init()
      >>> state = schedule.update(state, value=2.0)
      >>> print(schedule(state), schedule(state, value=1.0), schedule(state, value=3.0))
      0.5 1.0 0.25

    Source: as :func:`greedy_lr`.
    """
    settings = _Settings(
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        warmup=warmup,
        min_scale=min_learning_rate,
        max_scale=max_learning_rate,
        window=window,
        reset_at_min=reset_at_min,
        reset_after=reset_after,
        mode=mode,
        eps=eps,
        algorithm=algorithm,
        only_decrease=only_decrease,
    )
    names = ("min_learning_rate", "init_value", "max_learning_rate")
    rule = _greedy_rule(_check(settings, init_value, names))
    return _rule.schedule_by_rule(rule, init_value, every=every, axis_name=axis_name)


def _check(settings: _Settings, initial_scale: ArrayLike, names: tuple[str, str, str]) -> _Settings:
    """Checks the settings; ``names`` are the user's for the minimum, the initial scale and the maximum."""
    real, integer = _checks.check_real, _checks.check_integer
    min_name, _, max_name = names
    window, reset_at_min, reset_after = settings.window, settings.reset_at_min, settings.reset_after
    checked = _Settings(
        factor=real("factor", settings.factor, low=0.0, high=1.0, low_open=True, high_open=True),
        patience=integer("patience", settings.patience),
        threshold=real("threshold", settings.threshold, low=0.0, high_open=True),
        threshold_mode=_checks.check_choice("threshold_mode", settings.threshold_mode, ("abs", "rel")),
        cooldown=integer("cooldown", settings.cooldown),
        warmup=integer("warmup", settings.warmup),
        min_scale=real(min_name, settings.min_scale, low=0.0, high_open=True),
        max_scale=real(max_name, settings.max_scale, low=0.0, low_open=True, high_open=True),
        window=None if window is None else _checks.check_static_integer("window", window),
        reset_at_min=None if reset_at_min is None else integer("reset_at_min", reset_at_min, low=1),
        reset_after=None if reset_after is None else integer("reset_after", reset_after, low=1),
        mode=_checks.check_choice("mode", settings.mode, ("min", "max")),
        eps=real("eps", settings.eps, low=0.0, high_open=True),
        algorithm=_checks.check_choice("algorithm", settings.algorithm, ("reference", "paper")),
        only_decrease=_checks.check_bool("only_decrease", settings.only_decrease),
    )
    _checks.check_initial(names, checked.min_scale, initial_scale, checked.max_scale)
    if checked.algorithm == "paper" and checked.reset_at_min is not None:
        raise ValueError(
            f"reset_at_min must be None with algorithm='paper', got {reset_at_min!r}: Algorithm 1 "
            "resets by count (reset_after)."
        )
    if checked.algorithm == "paper" and not _is_zero(checked.eps):
        raise ValueError(
            f"eps must be 0 with algorithm='paper', got {settings.eps!r}: Algorithm 1 has no such bound."
        )
    return checked


def _greedy_rule(settings: _Settings) -> _rule.Rule:
    """The rule with settings that have been checked."""
    step = _reference_step if settings.algorithm == "reference" else _paper_step

    def init(scale: jax.Array) -> GreedyLRState:
        return _initial_state(settings, scale)

    def update(state: GreedyLRState, value: jax.Array) -> GreedyLRState:
        stepped = step(_as_arrays(settings, state.scale.dtype), state, value)
        return stepped._replace(decision=_numerics.overwrite(state.decision, stepped.decision))

    return _rule.Rule(init, update, name="greedy_lr")


def _as_arrays(settings: _Settings, dtype: jnp.dtype) -> _Settings:
    """Converts numbers to the dtypes of the state: floats to ``dtype``, counts to int32."""

    def real(value: ArrayLike) -> jax.Array | np.ndarray:
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


def _at_least_tiny(value: jax.Array | np.ndarray) -> ArrayLike:
    """``value``, at least the smallest normal number: a rate of 0, or flushed to 0, could not increase."""
    tiny = np.asarray(jnp.finfo(value.dtype).tiny)[()]
    return jnp.maximum(value, tiny) if isinstance(value, jax.Array) else np.maximum(value, tiny)


def _cast(value: ArrayLike, dtype: DTypeLike) -> jax.Array | np.ndarray:
    # A known number stays a NumPy scalar: it becomes a literal of the compiled program, without a transfer
    # to the device.
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
        num_good=zero(),
        num_bad=zero(),
        decision=zero(),
        cooldown_count=zero(),
        warmup_count=zero(),
        reset_countdown=jnp.array(0 if settings.reset_at_min is None else settings.reset_at_min, jnp.int32),
        num_observations=zero(),
        initial_scale=jnp.array(scale, copy=True),
        history=_ring.empty(settings.window or 1, dtype),  # checkpoints take no empty arrays
    )


def _reset(settings: _Settings, state: GreedyLRState) -> GreedyLRState:
    """The initial state, after the same decision."""
    scale = jnp.clip(state.initial_scale, settings.min_scale, settings.max_scale)
    initial = _initial_state(settings, scale)
    return initial._replace(decision=state.decision, history=_ring.clear(state.history))


def _smooth(
    settings: _Settings, state: GreedyLRState, value: jax.Array
) -> tuple[GreedyLRState, jax.Array, jax.Array]:
    """Adds a value to the window (line 4).

    Returns:
      The new state, the mean over the window, and whether both value and mean are finite (the sum of
      huge losses may overflow).
    """
    is_finite = jnp.isfinite(value)
    if settings.window in (None, 1):
        return state, value, is_finite
    was_cleared = settings.reset_at_min is not None or settings.reset_after is not None
    history = _ring.insert(state.history, value, is_finite)
    mean = _ring.mean(history, was_cleared=was_cleared)
    return state._replace(history=history), mean, is_finite & jnp.isfinite(mean)


def _improves(settings: _Settings, state: GreedyLRState, mean: jax.Array) -> jax.Array:
    """Whether ``mean`` improves on the best value by more than the threshold (line 6)."""
    best = settings.sign * state.best_value
    # Before the first improvement the best value is infinite, and every finite value improves on it.
    if settings.threshold_mode == "rel":
        known = _numerics.where(jnp.isfinite(best), best, 0)
        bound = known * _numerics.where(known < 0, 1 + settings.threshold, 1 - settings.threshold)
        bound = _numerics.where(jnp.isfinite(best), bound, best)
    else:
        bound = best - settings.threshold
    return settings.sign * mean < bound


def _inverse(factor: ArrayLike) -> ArrayLike:
    """The reciprocal of the factor, rounded once to its dtype.

    XLA replaces a division by a constant or broadcast divisor with a product with the reciprocal, and keeps
    other divisions. The last bit of a run would thus differ between a constant and a traced factor, or
    between a loop and a map. With an explicit product all agree.
    """
    one: Any = np.ones((), jnp.result_type(factor))[()]
    return one / factor


def _increment(count: jax.Array) -> jax.Array:
    return jnp.minimum(count, _checks.INT32_MAX - 1) + 1


def _is_zero(value: ArrayLike) -> bool:
    return not _checks.is_traced(value) and bool(value == 0)


def _count_down(settings: _Settings, state: GreedyLRState) -> tuple[GreedyLRState, jax.Array | bool]:
    """Counts a cooldown, or else a warmup, down by one; returns whether one was running.

    A counter that never starts is left out of the program: in a step of a few parameters every scalar that
    is written takes time.
    """
    is_holding = False
    for name in ("cooldown", "warmup"):  # never both positive
        if _is_zero(getattr(settings, name)):
            continue
        count = getattr(state, f"{name}_count")
        is_running = count > 0
        state = state._replace(**{f"{name}_count": count - is_running.astype(jnp.int32)})
        is_holding = is_holding | is_running
    return state, is_holding


class _Decision(NamedTuple):
    """A decision, as one condition for each field that it changes."""

    code: jax.Array  # shape=(), dtype=int32; one of the constants above
    is_better: jax.Array  # shape=(), dtype=bool; an improvement, BETTER or INCREASE
    is_worse: jax.Array  # shape=(), dtype=bool; WORSE or DECREASE
    increase: jax.Array  # shape=(), dtype=bool
    decrease: jax.Array  # shape=(), dtype=bool


def _decide(
    settings: _Settings, state: GreedyLRState, is_better: jax.Array, is_holding: jax.Array | bool
) -> _Decision:
    """Returns the decision on an observation."""
    is_worse = ~is_better
    if is_holding is not False:
        is_better, is_worse = is_better & ~is_holding, is_worse & ~is_holding
    increase = is_better & (_increment(state.num_good) > settings.patience)
    if settings.only_decrease:
        increase = jnp.zeros_like(increase)
    decrease = is_worse & (_increment(state.num_bad) > settings.patience)
    code = _numerics.where(is_better, _numerics.where(increase, INCREASE, BETTER), HOLD)
    code = _numerics.where(is_worse, _numerics.where(decrease, DECREASE, WORSE), code)
    return _Decision(code.astype(jnp.int32), is_better, is_worse, increase, decrease)


def _reference_step(settings: _Settings, state: GreedyLRState, value: jax.Array) -> GreedyLRState:
    """One observation by the published implementation."""
    state, mean, is_finite = _smooth(settings, state, value)

    state, is_holding = _count_down(settings, state)
    is_better = is_finite & _improves(settings, state, mean)
    decision = _decide(settings, state, is_better, is_holding)
    increase, decrease = decision.increase, decision.decrease
    # A restored state may have been saved with other bounds.
    current = jnp.clip(state.scale, settings.min_scale, settings.max_scale)
    raised = jnp.minimum(current * _inverse(settings.factor), settings.max_scale)
    lowered = jnp.maximum(current * settings.factor, settings.min_scale)
    if not _is_zero(settings.eps):
        raised = _numerics.where(raised - current > settings.eps, raised, current)
        lowered = _numerics.where(current - lowered > settings.eps, lowered, current)
    scale = _numerics.where(increase, raised, _numerics.where(decrease, lowered, current))

    stepped = state._replace(
        scale=scale,
        best_value=_numerics.where(decision.is_better, mean, state.best_value),
        num_good=_numerics.where(decision.is_better & ~increase, _increment(state.num_good), 0),
        num_bad=_numerics.where(decision.is_worse & ~decrease, _increment(state.num_bad), 0),
        decision=decision.code,
    )
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
        # The decrease starts its cooldown after a reset, too.
        initial = _reset(settings, stepped)._replace(cooldown_count=stepped.cooldown_count)
        stepped = stepped._replace(reset_countdown=countdown)
        stepped = _numerics.select(at_min & (countdown <= 0), initial, stepped)
    if settings.reset_after is not None:
        is_due = stepped.num_observations > settings.reset_after
        stepped = _numerics.select(is_due, _reset(settings, stepped), stepped)
    return stepped


def _paper_step(settings: _Settings, state: GreedyLRState, value: jax.Array) -> GreedyLRState:
    """One epoch of Algorithm 1, lines 3 to 40."""
    state, mean, is_finite = _smooth(settings, state, value)  # line 4

    is_better = is_finite & _improves(settings, state, mean)
    is_cooling = state.cooldown_count < settings.cooldown
    is_warming = state.warmup_count < settings.warmup
    is_holding = _numerics.where(is_better, is_cooling, is_warming)
    decision = _decide(settings, state, is_better, is_holding)

    raised = state.scale * _inverse(settings.factor)
    scale = _numerics.where(decision.increase, raised, state.scale)  # lines 26-28
    scale = _numerics.where(decision.decrease, scale * settings.factor, scale)  # lines 29-31

    stepped = state._replace(
        scale=scale,
        best_value=_numerics.where(is_better, mean, state.best_value),  # lines 6-13
        num_good=_numerics.where(decision.is_better, _increment(state.num_good), 0),
        num_bad=_numerics.where(decision.is_worse, _increment(state.num_bad), 0),
        decision=decision.code,
        cooldown_count=_numerics.where(is_cooling, state.cooldown_count + 1, 0),  # lines 14-19
        warmup_count=_numerics.where(is_warming, state.warmup_count + 1, 0),  # lines 20-25
        num_observations=_increment(state.num_observations),
    )
    if settings.reset_after is not None:  # lines 32-39
        initial = _reset(settings, stepped)._replace(
            best_value=stepped.best_value,
            cooldown_count=stepped.cooldown_count,
            warmup_count=stepped.warmup_count,
        )
        is_due = stepped.num_observations > settings.reset_after
        stepped = _numerics.select(is_due, initial, stepped)
    scale = jnp.clip(stepped.scale, settings.min_scale, settings.max_scale)  # line 40
    return stepped._replace(scale=scale)
