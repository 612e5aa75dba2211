"""The search for a rate at the beginning of a training: a ramp, then short trials, all from the same start.

A state machine over the losses. What it asks for is carried out by who holds the parameters
(:mod:`greedylr_jax.auto`): the rate of each step, and at some steps to go back to where all began.

1. *Ramp.* The rate rises geometrically over ten decades, until the loss has risen above where it began, by
   more than its noise. The rate that it has risen at is the *edge*; if it has not risen, the last rate is.
2. *Trials.* Trainings of a few steps at constant rates, half a decade apart, from half a decade below the
   edge downwards. Their result is the mean loss of their second half. A trial is given up as soon as its
   loss rises as in the ramp, though it might come down again: what a network learns after that it would
   have learnt better at a lower rate; and with it all before, as higher rates are too high as well. The
   search is over when the next trial was worse than the best one by more than noise, or the next two were
   worse at all; and the best is one that has learnt something. It is over, too, when four in a row have left
   the loss where it was: lower rates will learn no more in these few steps.
3. The rate that is found is that of the best trial, or rather the vertex of a parabola through the results
   around it. Where the last four trials tell nothing it is that of their second highest rate.

What a ramp alone says depends on its speed and on noise; a trial of thirty steps says within a factor of
about three what rate trains best, with most networks, and if not, it is too low.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedylr_jax import _numerics
from greedylr_jax._window import NEAR, Window, empty_window, mean_variance, observe, rise_threshold, variance

RAMP, TRIAL, FOUND = 0, 1, 2  # stages
LOWEST, HIGHEST = -6.0, 4.0  # decades of the ramp around its centre
MAX_TRIALS = 20
_QUIET = 10  # losses of the ramp that tell where it began and how noisy they are
_FLAT = 4  # trials in a row that change nothing
_RATIO = 10.0**-0.5  # of the rates of two trials
_ERRORS = 3.0  # standard errors by which two means surely differ


class Lengths(NamedTuple):
    """Numbers of steps; may be traced."""

    ramp: jax.Array
    trial: jax.Array
    all: jax.Array  # after which no further trial is begun


class SearchState(NamedTuple):
    """What is known so far."""

    stage: jax.Array  # shape=(), dtype=int32; RAMP, TRIAL or FOUND
    step: jax.Array  # shape=(), dtype=int32; losses of the ramp, or of this trial
    seen: jax.Array  # shape=(), dtype=int32; losses of the whole search
    first: Window  # the ramp's first losses
    recent: jax.Array  # shape=(3,), dtype=float; the last losses, newest first
    edge: jax.Array  # shape=(), dtype=float; the rate at which the ramp ended
    rose: jax.Array  # shape=(), dtype=bool; whether that was as the loss had risen
    trial: jax.Array  # shape=(), dtype=int32; number of this trial
    late: Window  # losses of this trial's second half
    jumps: jax.Array  # shape=(), dtype=float; squared differences of one of these and the next, summed
    results: jax.Array  # shape=(MAX_TRIALS,), dtype=float; infinite where not run, or given up
    variances: jax.Array  # shape=(MAX_TRIALS,), dtype=float; of the results; 0 for those not run
    found: jax.Array  # shape=(), dtype=float; the rate that was looked for; 0 while not known


def begin() -> SearchState:
    """The state before the first loss."""
    dtype = _numerics.default_float_dtype()
    return SearchState(
        stage=jnp.full((), RAMP, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        seen=jnp.zeros((), jnp.int32),
        first=empty_window(),
        recent=jnp.full(NEAR, jnp.inf, dtype),
        edge=jnp.zeros((), dtype),
        rose=jnp.zeros((), bool),
        trial=jnp.zeros((), jnp.int32),
        late=empty_window(),
        jumps=jnp.zeros((), dtype),
        results=jnp.full(MAX_TRIALS, jnp.inf, dtype),
        variances=jnp.zeros(MAX_TRIALS, dtype),
        found=jnp.zeros((), dtype),
    )


def ramp_rate(centre: jax.Array, step: jax.Array, lengths: Lengths) -> jax.Array:
    """The rate of a step of the ramp."""
    dtype = _numerics.default_float_dtype()
    share = step.astype(dtype) / (jnp.asarray(lengths.ramp, dtype) - 1)
    return jnp.asarray(centre, dtype) * 10.0 ** (LOWEST + (HIGHEST - LOWEST) * share)


def rate(state: SearchState, centre: jax.Array, lengths: Lengths) -> jax.Array:
    """The rate of the step whose loss was seen last; meaningless once the search is over."""
    ramping = ramp_rate(centre, state.step - 1, lengths)
    return jnp.where(state.stage == RAMP, ramping, _trial_rate(state.edge, state.trial.astype(ramping.dtype)))


def advance(
    state: SearchState, loss: jax.Array, centre: jax.Array, lengths: Lengths
) -> tuple[SearchState, jax.Array]:
    """The state after one more loss, and whether the way is back to the start now."""
    ramps, tries = state.stage == RAMP, state.stage == TRIAL
    step = state.step + 1
    first = _numerics.select(ramps & (state.step < _QUIET), observe(state.first, loss), state.first)
    recent = jnp.roll(state.recent, 1).at[0].set(loss)
    is_above = ~(_mean_of_finite(recent) <= start_limit(first))

    has_risen = ramps & (state.step >= _QUIET) & is_above
    ramp_ends = has_risen | (ramps & (state.step >= jnp.asarray(lengths.ramp, jnp.int32)))
    edge = jnp.where(ramp_ends, ramp_rate(centre, jnp.maximum(state.step - 1, 0), lengths), state.edge)

    length = jnp.asarray(lengths.trial, jnp.int32)
    is_late = tries & (state.step >= length - length // 2)
    late = _numerics.select(is_late, observe(state.late, loss), state.late)
    jump = loss - state.recent[0]
    jumped = is_late & (state.late.steps > 0) & jnp.isfinite(jump)
    jumps = state.jumps + jnp.where(jumped, jump, 0) ** 2
    # The first loss of a trial is of parameters that it has not changed.
    given_up = tries & (~jnp.isfinite(loss) | (is_above & (state.step >= NEAR)))
    trial_ends = (tries & (state.step >= length)) | given_up
    number = jnp.arange(MAX_TRIALS)
    is_this = trial_ends & (number == state.trial)
    results = jnp.where(is_this, late.mean, state.results)
    results = jnp.where(given_up & (number <= state.trial), jnp.inf, results)
    count = jnp.maximum(late.finite, 2)
    # A trend adds little to differences of neighbours, which have twice the variance of single losses.
    spread = jumps / (2 * (count - 1) * count)
    variances = jnp.where(is_this, spread, state.variances)
    seen = state.seen + 1
    no_time = seen >= jnp.asarray(lengths.all, jnp.int32)
    is_flat = state.rose & _are_flat(results, variances, state.trial, first)
    is_enough = is_flat | _knows_best(results, variances, state.trial, first)
    finished = trial_ends & (is_enough | no_time | (state.trial >= MAX_TRIALS - 1))
    chosen = jnp.where(is_flat, (state.trial - (_FLAT - 2)).astype(loss.dtype), _choose(results, state.trial))

    stage = jnp.where(ramp_ends, TRIAL, jnp.where(finished, FOUND, state.stage)).astype(jnp.int32)
    goes_back = ramp_ends | trial_ends
    return SearchState(
        stage=stage,
        step=jnp.where(goes_back, 0, step),
        seen=seen,
        first=first,
        recent=jnp.where(goes_back, jnp.full_like(recent, -jnp.inf), recent),
        edge=edge,
        rose=state.rose | has_risen,
        trial=state.trial + (trial_ends & ~finished).astype(jnp.int32),
        late=_numerics.select(goes_back, empty_window(), late),
        jumps=jnp.where(goes_back, 0, jumps),
        results=results,
        variances=variances,
        found=jnp.where(finished, _trial_rate(edge, chosen), state.found),
    ), goes_back


def start_limit(first: Window) -> jax.Array:
    """What losses exceed that have risen above the ramp's first; infinite if hardly any is known."""
    return jnp.where(first.finite > 1, rise_threshold(first.mean, variance(first)), jnp.inf)


def has_learnt(results: jax.Array, variances: jax.Array, first: Window) -> jax.Array:
    """Whether the best trial has lowered the loss; ``first`` are losses before any is."""
    best = jnp.argmin(results)
    return is_lower(results[best], variances[best], first)


def is_lower(mean: jax.Array, error: jax.Array, first: Window) -> jax.Array:
    """Whether a mean, with its squared standard error, is surely below the first losses of the ramp."""
    return mean < first.mean - _ERRORS * jnp.sqrt(error + mean_variance(first))


def _trial_rate(edge: jax.Array, number: jax.Array) -> jax.Array:
    return edge * _RATIO ** (number + 1)


def _mean_of_finite(losses: jax.Array) -> jax.Array:
    """Infinite if none is finite."""
    finite = jnp.isfinite(losses)
    return jnp.where(jnp.any(finite), jnp.mean(losses, where=finite), jnp.inf)


def _knows_best(results: jax.Array, variances: jax.Array, last: jax.Array, first: Window) -> jax.Array:
    """Whether the trials so far tell at which rate most is learnt."""
    best = jnp.argmin(results)
    surely_worse = results[last] > results[best] + _ERRORS * jnp.sqrt(variances[best] + variances[last])
    enough = (last >= best + 2) | ((last > best) & surely_worse)
    return enough & has_learnt(results, variances, first)


def _are_flat(results: jax.Array, variances: jax.Array, last: jax.Array, first: Window) -> jax.Array:
    """Whether the last few trials have left the loss where it was, and none has learnt anything."""
    number = jnp.arange(MAX_TRIALS)
    bound = _ERRORS * jnp.sqrt(variances + mean_variance(first))
    is_flat = jnp.abs(results - first.mean) <= bound
    is_recent = (number <= last) & (number > last - _FLAT)
    return (jnp.sum(is_flat & is_recent) == _FLAT) & ~has_learnt(results, variances, first)


def _choose(results: jax.Array, last: jax.Array) -> jax.Array:
    """The number of the trial at whose rate to begin; a fraction between two of them."""
    best = jnp.argmin(results)
    # Nothing was learnt at any rate: the least one does the least harm.
    return jnp.where(jnp.isfinite(results[best]), _vertex(results, best, last), last.astype(results.dtype))


def _vertex(results: jax.Array, best: jax.Array, last: jax.Array) -> jax.Array:
    """Where the parabola through the best result and its neighbours is least."""
    left, middle, right = (results[jnp.clip(best + i, 0, MAX_TRIALS - 1)] for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    has_neighbours = (best > 0) & (best < last) & jnp.isfinite(curvature) & (curvature > 0)
    offset = jnp.where(has_neighbours, (left - right) / (2 * jnp.where(has_neighbours, curvature, 1)), 0)
    return best.astype(offset.dtype) + jnp.clip(offset, -0.5, 0.5)
