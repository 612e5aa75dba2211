"""A rule that needs no initial rate: it looks for one, goes back to the start, and trains.

The first part of the training is a search (:mod:`greedylr_jax._search`): the rate rises over ten decades
until the loss rises, and then a few short trials from the *initial parameters and a fresh optimizer* tell at
which rate most is learnt. The training begins there, at half that rate, with the trend rule
(:mod:`greedylr_jax.trend`). This may raise it to what was found, and to thirty times that, as what learns
most in a few steps is often too low for many, while the training leads on away from the initial parameters;
but not above two fifths of the rate that the ramp's loss rose at, or all of it where no trial learnt
anything. It drifts up where the training leads on to some use, or nothing has been learnt yet. In the last
two fifths of the training the rate falls to zero.

Whether it leads on is told by the *pull*, the product <g, p - p0> of the gradient at the parameters p with
the way from the initial ones, which is the slope of the loss along this way. Below zero, by more than its
standard error, a longer way would have been better; above zero steps are too long for what they are worth,
even if the loss still falls. What a significant fall of the loss allows, it limits beyond the rate that was
found only: to ask it of every raise helps where the search has found too much, as it can with AdamW on text,
and costs more elsewhere.

All along there is one place to go back to: the initial parameters, and later those of the least mean loss.
If twenty losses in a row are far above what they were there, or not finite, the training goes back, and the
rate is cut (:mod:`greedylr_jax.rollback`).

There is no paper. The ramp is the range test of L. N. Smith, "Cyclical Learning Rates for Training Neural
Networks", 2017, inside the training.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _inner, _numerics, _observe, _rollback, _rule, _search, _snapshot, _trend
from greedylr_jax._window import Window, empty_window, mean_variance, observe, variance

_BACKOFF = 0.5  # the rate to start with over that which the search found
_TRUSTED = 1.0  # the highest rate over that which the search found, where the training leads back
_RISE = 30.0  # the same, where it leads on
_ASKED = 4  # steps from one pull to the next
_MARGIN = 0.4  # the highest rate over that of the edge, where a trial has learnt something
_LEAST = 1e-4  # the lowest rate over the one to start with
_WINDOW, _WINDOW_SHARE = 20, 40  # of the trend rule: at least 20, and a fortieth of the steps so far
_DRIFT = 1.4  # by the trend rule, where the training leads on, or the loss is what it was at the start
_WORTH = 0.02  # of the fall of the loss so far, which a way e times as long must promise for a drift
_RAMP_STEPS, _RAMP_SHARE, _LEAST_RAMP = 100, 0.06, 30
_TRIAL_STEPS, _TRIAL_SHARE, _LEAST_TRIAL = 50, 0.03, 10
_SEARCHED = 0.3  # of the steps, after which no further trial is begun
_ANNEALED = 0.4  # of the steps


class AutoState(NamedTuple):
    """State of :func:`auto_lr`."""

    rate: _rule.RateState
    step: jax.Array  # shape=(), dtype=int32; losses seen
    search: _search.SearchState
    trend: _trend.TrendState
    last: Window  # the last window that the trend rule has tested
    monitor: _rollback.DivergenceMonitor
    snapshot: _snapshot.Snapshot  # of the parameters alone
    origin: optax.Params  # the initial parameters, rounded to 16 bits: they only tell a direction
    pulls: Window  # since the trend rule's last test
    restore_steps_left: jax.Array  # shape=(), dtype=int32; further steps that restoring may take
    num_rollbacks: jax.Array  # shape=(), dtype=int32; those of the search not counted
    inner_state: optax.OptState


def auto_lr(
    inner: optax.GradientTransformation,
    learning_rate: ArrayLike = 1e-3,
    *,
    total_steps: ArrayLike | None = None,
    ramp_steps: ArrayLike | None = None,
    trial_steps: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """An optimizer that finds its learning rate itself, and keeps looking after it.

    Call ``update`` with the loss of the step: ``tx.update(grads, state, params, value=loss)``.

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.adamw(1.0)``.
      learning_rate: > 0; the ramp goes from a millionth of it to ten thousand times of it. This and all
        numbers may be traced.
      total_steps: length of the training, the search included, an integer >= 1: over the last two fifths of
        it the rate falls linearly to zero. None: it does not fall by itself.
      ramp_steps: longest ramp, an integer >= 30. Default: 100, or 6% of ``total_steps`` where that is less.
      trial_steps: steps of each trial, an integer >= 10. Default: 50, or 3% of ``total_steps`` where that is
        less. There are usually three to six trials, and no further one is begun after 30% of ``total_steps``.
      axis_name: the mapped axis, or axes, over which losses are averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params`` and ``value``. Its
      state has one copy of the parameters, and one in 16 bits. Some updates lead back to earlier parameters;
      where one addition cannot reach them to the last bit, further ones do, whose gradients are not used.
      Keep what changes updates (weight decay, clipping) in ``inner`` and not behind it. What ``update`` is
      given are the gradients of ``value``; a constant factor between them makes the rate more or less eager
      to rise. Parameters must all be seen: not inside ``optax.masked`` or ``optax.partition``. What is not a
      parameter, such as the statistics of a batch normalisation, does not go back.

    Raises:
      ValueError: if a number is out of its range. Its ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params`` or ``value`` is missing, or the value is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> loss_fn = lambda params: jnp.sum((params - 1) ** 2)
      >>> tx = greedylr_jax.auto_lr(optax.sgd(1.0), total_steps=300)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     return (optax.apply_updates(params, updates), state), loss
      >>> params = jnp.zeros(3)
      >>> (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=300)
      >>> bool(losses[-1] < 1e-6)
      True

    Source: this project; the ramp is Smith's range test (2017), inside the training.
    """
    centre = _checks.check_real("learning_rate", learning_rate, low=0.0, low_open=True, high_open=True)
    if total_steps is not None:
        total_steps = _checks.check_integer("total_steps", total_steps, low=1)
    lengths = _lengths(total_steps, ramp_steps, trial_steps)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> AutoState:
        _inner.check_descends("auto_lr", inner, params)
        dtype = _numerics.default_float_dtype()
        return AutoState(
            rate=_rule.RateState(_search.ramp_rate(centre, jnp.zeros((), jnp.int32), lengths)),
            step=jnp.zeros((), jnp.int32),
            search=_search.begin(),
            trend=_trend.trend_rule(_trend.TrendSettings(min_scale=_LEAST, max_scale=jnp.inf)).init(
                jnp.ones((), dtype)
            ),
            last=empty_window(),
            monitor=_rollback.empty_monitor(),
            snapshot=_snapshot.take_snapshot(params, ()),
            origin=jax.tree.map(_rounded, params),
            pulls=empty_window(),
            restore_steps_left=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: AutoState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AutoState]:
        _snapshot.check_params("auto_lr", params)
        loss, observed = _observe.read_loss("auto_lr", value, has_value, state.search.edge.dtype, axis_name)
        extra_args |= {"value": loss if value is None else value, "has_value": has_value}
        step, inner_state = inner.update(updates, state.inner_state, params, **extra_args)

        pulls = _observe_pull(state, updates, params, axis_name)
        # Whether this step is still one of the way back shows in the parameters: it is taken as a good one,
        # and dropped below where it is not.
        numbers, restore, save = _advance(state, pulls, loss, centre, lengths)
        learning_rate = jnp.where(
            numbers.search.stage == _search.FOUND,
            _BACKOFF * numbers.search.found * numbers.trend.scale * _anneal(state.step, total_steps),
            _search.rate(numbers.search, centre, lengths),
        ).astype(loss.dtype)
        learning_rate = jnp.where(observed & ~restore, learning_rate, state.rate.learning_rate)
        restoring = state.restore_steps_left > 0
        searches = state.search.stage != _search.FOUND
        actions = _snapshot.Actions(
            save=observed & save,
            skip=jnp.asarray(False),
            restore=observed & restore & ~restoring,
            restoring=restoring,
        )
        steps, _, snapshot, restores = _snapshot.act(
            actions, _numerics.scale_updates(step, learning_rate), (), state.snapshot, params, ()
        )
        starts = restores & ~restoring
        numbers = _numerics.select(observed & (starts | ~restores), numbers, _numbers(state))
        return steps, AutoState(
            rate=_rule.RateState(jnp.where(restores, state.rate.learning_rate, learning_rate)),
            step=jnp.where(observed, optax.safe_increment(state.step), state.step),
            snapshot=snapshot,
            origin=state.origin,
            restore_steps_left=_snapshot.steps_left(restores, restoring, state.restore_steps_left),
            num_rollbacks=state.num_rollbacks + (starts & ~searches).astype(jnp.int32),
            inner_state=_numerics.select(restores, inner.init(snapshot.params), inner_state),
            **numbers._asdict(),
        )

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


class _Numbers(NamedTuple):
    """The part of the state that a loss changes."""

    search: _search.SearchState
    trend: _trend.TrendState
    last: Window
    monitor: _rollback.DivergenceMonitor
    pulls: Window


def _numbers(state: AutoState) -> _Numbers:
    return _Numbers(state.search, state.trend, state.last, state.monitor, state.pulls)


def _advance(
    state: AutoState, pulls: Window, loss: jax.Array, centre: ArrayLike, lengths: _search.Lengths
) -> tuple[_Numbers, jax.Array, jax.Array]:
    """The numbers after one more loss; whether to go back now; whether to keep these parameters.

    ``pulls`` are those of the state and of this step.
    """
    is_found = state.search.stage == _search.FOUND
    search, search_returns = _search.advance(state.search, loss, centre, lengths)
    begins = ~is_found & (search.stage == _search.FOUND)
    search = _numerics.select(is_found, state.search, search)

    monitor, restore = _rollback.observe_loss(state.monitor, loss)
    restore &= is_found
    rule = _trend_rule(state, pull=pulls.mean + jnp.sqrt(mean_variance(pulls)))
    # A return is a loss that is not finite to the rule, upon which it cuts.
    observed_loss = jnp.where(restore, jnp.nan, loss)
    moved = _numerics.select(is_found, rule.update(state.trend, observed_loss), state.trend)
    diverged = moved.decision == _trend.DIVERGED
    tested = (moved.decision != _trend.WAIT) & ~diverged
    last = _numerics.select(tested, moved.window, state.last)
    last = _numerics.select(diverged, empty_window(), last)
    save = tested & _rollback.is_improvement(monitor, last)
    monitor = _numerics.select(save, _rollback.monitor_from(last.mean, variance(last)), monitor)
    # At the start the losses are those that the ramp began with.
    at_start = _rollback.empty_monitor()._replace(threshold=_search.start_limit(search.first))
    monitor = _numerics.select(begins, at_start, _numerics.select(is_found, monitor, state.monitor))
    pulls = _numerics.select(is_found & (moved.decision == _trend.WAIT), pulls, empty_window())
    return _Numbers(search, moved, last, monitor, pulls), search_returns & ~is_found | restore, save


def _trend_rule(state: AutoState, pull: jax.Array) -> _rule.Rule:
    """The rule for the next loss; ``pull`` is what the training's is at most, but for noise."""
    first, last = state.search.first, state.last
    # On noise alone a drift would raise the rate until the network is lost. Where all examples are fitted the
    # training leads on for ever, to little use.
    is_learning = _search.is_lower(last.mean, mean_variance(last), first)
    drifts = (pull < -_WORTH * (first.mean - last.mean)) | ~is_learning
    return _trend.trend_rule(
        _trend.TrendSettings(
            min_scale=_LEAST,
            max_scale=_highest_scale(state.search, state.trend.scale, leads_on=pull < 0),
            window=jnp.maximum(_WINDOW, state.step // _WINDOW_SHARE),
            drift=jnp.where(drifts, _DRIFT, 1.0),
        )
    )


def _highest_scale(search: _search.SearchState, scale: jax.Array, leads_on: jax.Array) -> jax.Array:
    """What the trend rule may multiply the first rate by, now that it does by ``scale``."""
    # Where the loss never rose the edge is the end of the ramp, beyond which nothing is known.
    has_learnt = _search.has_learnt(search.results, search.variances, search.first)
    margin = jnp.where(has_learnt, _MARGIN, 1.0)
    highest = jnp.maximum(jnp.minimum(_RISE * search.found, margin * search.edge), search.found)
    first = _BACKOFF * search.found
    highest = jnp.where(first > 0, highest / jnp.where(first > 0, first, 1), jnp.inf)
    trusted = jnp.maximum(scale, _TRUSTED / _BACKOFF)
    return jnp.where(has_learnt & ~leads_on, jnp.minimum(highest, trusted), highest)


def _rounded(leaf: jax.Array) -> jax.Array:
    """A copy, of floating point numbers in 16 bits."""
    leaf = jnp.asarray(leaf)
    is_wide = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits > 16
    return jnp.array(leaf, jnp.bfloat16 if is_wide else leaf.dtype, copy=True)


def _observe_pull(
    state: AutoState, gradients: optax.Updates, params: optax.Params, axis_name: Hashable | None
) -> Window:
    """The pulls after this step, which is one of those that are asked or not."""
    dtype = state.pulls.mean.dtype

    def product(gradient: jax.Array, param: jax.Array, first: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(param), jnp.inexact):
            return jnp.zeros((), dtype)
        wide = jnp.promote_types(param.dtype, dtype)
        way = param.astype(wide) - first.astype(wide)
        return jnp.sum(jnp.real(jnp.conj(gradient.astype(wide)) * way)).astype(dtype)

    def pull() -> jax.Array:
        return jnp.asarray(optax.tree.sum(jax.tree.map(product, gradients, params, state.origin)), dtype)

    # Not at each step, as it reads all parameters.
    is_asked = (state.search.stage == _search.FOUND) & (state.step % _ASKED == 0)
    asked = jax.lax.cond(is_asked, pull, lambda: jnp.zeros((), dtype))
    return _numerics.select(is_asked, observe(state.pulls, _observe.average(asked, axis_name)), state.pulls)


def _lengths(
    total_steps: ArrayLike | None, ramp_steps: ArrayLike | None, trial_steps: ArrayLike | None
) -> _search.Lengths:
    def length(name: str, given: ArrayLike | None, share: float, least: int, most: int) -> ArrayLike:
        if given is not None:
            return _checks.check_integer(name, given, low=least)
        if total_steps is None:
            return most
        return jnp.clip(share * jnp.asarray(total_steps, jnp.float32), least, most).astype(jnp.int32)

    ramp_steps = length("ramp_steps", ramp_steps, _RAMP_SHARE, _LEAST_RAMP, _RAMP_STEPS)
    trial_steps = length("trial_steps", trial_steps, _TRIAL_SHARE, _LEAST_TRIAL, _TRIAL_STEPS)
    most = _checks.INT32_MAX if total_steps is None else _SEARCHED * jnp.asarray(total_steps, jnp.float32)
    return _search.Lengths(ramp_steps, trial_steps, most)


def _anneal(step: jax.Array, total_steps: ArrayLike | None) -> jax.Array:
    """1, and over the last steps linearly to zero."""
    if total_steps is None:
        return jnp.ones(())
    total = jnp.asarray(total_steps, _numerics.default_float_dtype())
    return jnp.clip((total - step) / (_ANNEALED * total), 0, 1)
