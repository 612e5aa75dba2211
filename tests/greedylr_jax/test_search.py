"""The search for a rate, on losses that are known functions of the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedylr_jax import _search
from greedylr_jax._window import Window

LENGTHS = _search.Lengths(ramp=60, trial=20, all=1000)


def search(drop, *, errors=0.0, lengths=LENGTHS, steps=400):
    """Feeds the losses of a training whose loss falls by ``drop(rate)`` a step, between 0 and 1e6."""

    def body(carry, error):
        state, loss = carry
        state, back = _search.advance(state, loss + error, jnp.float32(1), lengths)
        rate = _search.rate(state, jnp.float32(1), lengths)
        moved = jnp.clip(loss - drop(rate), 0.0, 1e6)
        return (state, jnp.where(back, 1.0, moved)), (state, loss, rate)

    errors = jnp.broadcast_to(jnp.float32(errors), (steps,))
    return jax.jit(lambda: jax.lax.scan(body, (_search.begin(), jnp.float32(1)), errors))()[1]


def bowl(best, edge):
    """Learns most at ``best``, and diverges from ``edge`` on."""

    def drop(rate):
        speed = 0.04 * jnp.exp(-(jnp.log(rate / best) ** 2) / 8)
        return jnp.where(rate > edge, -1.0, speed)

    return drop


@pytest.fixture(scope="module")
def history():
    return search(bowl(0.01, 0.2))


def test_it_finds_the_rate_that_learns_most():
    best, ratio, noise = (
        grid.ravel() for grid in np.meshgrid([1e-3, 0.02, 0.3, 5.0], [3.0, 30.0], [0.0, 0.02])
    )
    errors = np.random.default_rng(0).standard_normal(400).astype(np.float32)
    run = jax.vmap(
        lambda b, r, n: jax.tree.map(lambda x: x[-1], search(bowl(b, r * b), errors=n * errors)[0])
    )
    state = run(*(jnp.asarray(each, jnp.float32) for each in (best, ratio, noise)))
    assert (state.stage == _search.FOUND).all()
    # A step of the ramp is 1.5, and it takes three losses to see a rise.
    assert (ratio * best / 1.5 < state.edge).all() and (state.edge < 4 * ratio * best).all()
    assert (best / 2 < state.found).all() and (state.found < best * 2).all()


def test_trials_are_half_a_decade_apart_and_end_after_the_best(history):
    states, _, rates = history
    trials, tries = np.asarray(states.trial), np.asarray(states.stage) == _search.TRIAL
    edge = float(states.edge[-1])
    for trial in range(trials.max() + 1):
        own = np.asarray(rates)[tries & (trials == trial)]
        np.testing.assert_allclose(own, edge * 10 ** (-0.5 * (trial + 1)), rtol=1e-5)
    results = np.asarray(states.results[-1])
    assert np.argmin(results) == trials.max() - 1  # without noise the next is surely worse
    assert np.isinf(results[trials.max() + 1 :]).all()


def known(*values, filler):
    """Values of the first trials, as the search keeps them."""
    return jnp.full(_search.MAX_TRIALS, filler, jnp.float32).at[: len(values)].set(jnp.float32(values))


# Ten losses before anything is learnt: mean 1, variance 0.1, and so a standard error of 0.1.
FIRST = Window(jnp.array([10, 10, 1.0, 0.9]))


@pytest.mark.parametrize(
    ("results", "error", "over"),
    [
        ((0.5, 0.4), 0.01, False),  # still falling
        ((0.4, 0.5), 0.01, True),  # the next is 7 standard errors of the difference above
        ((0.4, 0.5), 0.03, False),  # 2.4 of them
        ((0.4, 0.5, 0.45), 0.03, True),
        ((np.inf, 0.4, 0.5), 0.01, True),
        ((0.72, 0.9), 0.01, False),  # 2.8 standard errors below the first losses
        ((0.68, 0.9), 0.01, True),  # 3.2
        ((0.72, 0.9, 0.9), 0.01, False),
        ((np.inf, np.inf, np.inf), 0.0, False),
    ],
)
def test_the_search_is_over_when_what_follows_the_best_is_worse(results, error, over):
    squares = known(*(error**2 for _ in results), filler=0.0)
    last = jnp.int32(len(results) - 1)
    assert bool(_search._knows_best(known(*results, filler=np.inf), squares, last, FIRST)) is over


@pytest.mark.parametrize(
    ("results", "error", "flat"),
    [
        ((1.0, 0.9, 1.1, 1.0), 0.01, True),
        ((1.0, 0.9, 1.1), 0.01, False),  # one too few
        ((np.inf, 1.0, 0.9, 1.1, 1.0), 0.01, True),
        ((1.0, np.inf, 0.9, 1.1, 1.0), 0.01, False),
        ((1.0, 0.9, 1.32, 1.0), 0.01, False),  # 3.2 standard errors above: that rate was too high
        ((1.0, 0.9, 1.32, 1.0), 0.05, True),  # 2.9
        ((0.6, 1.0, 0.9, 1.1, 1.0), 0.01, False),  # something was learnt before
        ((5.0, 1.0, 0.9, 1.1, 1.0), 0.01, True),
    ],
)
def test_trials_are_flat_where_four_in_a_row_leave_the_loss_where_it_was(results, error, flat):
    squares = known(*(error**2 for _ in results), filler=0.0)
    last = jnp.int32(len(results) - 1)
    assert bool(_search._are_flat(known(*results, filler=np.inf), squares, last, FIRST)) is flat


@pytest.mark.parametrize("edge", [1e-3, 0.2])
def test_where_trials_are_too_short_to_learn_anything_lower_rates_are_not_tried(edge):
    states, _, _ = search(lambda rate: jnp.where(rate > edge, -1.0, 0.0))
    results = np.asarray(states.results[-1])
    flat = np.isfinite(results)
    assert flat.sum() == 4 and states.trial[-1] == np.flatnonzero(flat)[-1]
    highest = states.edge[-1] * 10.0 ** (-0.5 * (np.flatnonzero(flat)[0] + 1))
    assert edge / 10 < highest <= edge
    np.testing.assert_allclose(states.found[-1], highest * 10**-0.5, rtol=1e-5)


def test_where_the_loss_has_not_risen_flat_trials_tell_nothing():
    states, _, _ = search(lambda rate: 0 * rate, steps=600)
    assert states.trial[-1] == _search.MAX_TRIALS - 1 and states.stage[-1] == _search.FOUND


@pytest.mark.parametrize(
    ("results", "chosen"),
    [
        ((0.9, 0.5, 0.4, 0.5), 2.0),  # a symmetric parabola
        ((0.9, 0.4, 0.4, 0.9), 1.5),  # between two that are equal
        ((0.42, 0.5, 0.4, 0.5), 2.0),
        ((0.9, 0.4, 0.8), 1 + 0.5 * (0.9 - 0.8) / (0.9 - 0.8 + 0.8)),
        ((0.4, 0.5), 0.0),  # no neighbour above
        ((np.inf, 0.4, 0.5), 1.0),  # none that has a result
        ((np.inf, np.inf, np.inf), 2.0),  # nothing learnt anywhere: the lowest
    ],
)
def test_the_vertex_around_the_best_rate_is_chosen(results, chosen):
    got = _search._choose(known(*results, filler=np.inf), jnp.int32(len(results) - 1))
    np.testing.assert_allclose(got, chosen, rtol=1e-6)


def test_the_error_of_a_result_comes_of_differences_of_neighbours():
    errors = np.random.default_rng(0).normal(scale=0.05, size=400).astype(np.float32)
    states, losses, _ = search(bowl(0.01, 0.2), errors=errors)
    trials, tries = np.asarray(states.trial), np.asarray(states.stage) == _search.TRIAL
    own = np.flatnonzero(tries & (trials == 1))
    late = (np.asarray(losses) + errors)[own[0] + 1 : own[-1] + 2][-11:].astype(float)
    expected = np.mean(np.diff(late) ** 2) / 2 / len(late)
    np.testing.assert_allclose(states.variances[-1][1], expected, rtol=1e-4)
    assert 0.3 < expected / (0.05**2 / 11) < 3  # what the noise was made with


def test_results_are_means_of_the_second_half(history):
    states, losses, _ = history
    trials, tries = np.asarray(states.trial), np.asarray(states.stage) == _search.TRIAL
    best = int(np.argmin(states.results[-1]))
    # The last loss of a trial is the one with which the next begins.
    own = np.flatnonzero(tries & (trials == best))
    seen = np.asarray(losses)[own[0] + 1 : own[-1] + 2]
    assert len(seen) == 21
    np.testing.assert_allclose(states.results[-1][best], seen[-11:].mean(), rtol=1e-5)


def test_the_vertex_of_the_parabola_lies_between_the_trials(history):
    states, _, _ = history
    results, edge = np.asarray(states.results[-1], float), float(states.edge[-1])
    best = int(np.argmin(results))
    coefficients = np.polyfit(np.arange(best - 1, best + 2), results[best - 1 : best + 2], 2)
    vertex = -coefficients[1] / (2 * coefficients[0])
    np.testing.assert_allclose(states.found[-1], edge * 10 ** (-0.5 * (vertex + 1)), rtol=1e-3)


def test_a_trial_that_diverges_is_given_up():
    states, losses, _ = search(bowl(1e-3, 0.03))
    trials, tries = np.asarray(states.trial), np.asarray(states.stage) == _search.TRIAL
    assert np.isfinite(losses).all()
    first = np.sum(tries & (trials == 0))
    assert np.isinf(states.results[-1][0]) == (first < 20)


def try_rate(state, losses):
    """The state after these losses of a trial, and after which of them the way was back to the start."""
    state = state._replace(stage=jnp.int32(_search.TRIAL), first=FIRST, edge=jnp.float32(1))
    state = state._replace(recent=jnp.full(3, -jnp.inf, jnp.float32))
    ends = []
    for loss in losses:
        state, back = _search.advance(state, jnp.float32(loss), jnp.float32(1), LENGTHS)
        ends.append(bool(back))
    return state, ends


@pytest.mark.parametrize(
    ("losses", "given_up"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6), None),
        ((9.0, 0.9, 0.8, 0.7), None),  # before the trial has changed anything
        ((1.0, 2.0, 2.0, 2.0, 2.0, 0.1), None),  # 2.10 is six standard errors of three losses above the first
        ((1.0, 2.2, 2.2, 2.2, 0.1), 4),
        ((1.0, 0.9, 6.0, 0.1, 0.1), 4),
        ((1.0, 0.9, 0.8, 0.7, 2.2, 2.2, 2.2), 7),
        ((1.0, 0.9, np.inf, 0.9), 3),
        ((np.nan, 0.9, 0.9), 1),
    ],
)
def test_a_trial_is_given_up_as_soon_as_its_loss_rises_above_the_start(losses, given_up):
    state, ends = try_rate(_search.begin(), losses)
    assert ends.index(True) + 1 == given_up if given_up else not any(ends)
    assert np.isinf(state.results[0]) and int(state.trial) == (given_up is not None)


@pytest.mark.parametrize("losses", [(1.0, np.inf), (1.0, 3.0, 3.0, 3.0)], ids=["not finite", "risen"])
def test_rates_above_one_that_is_too_high_are_too_high_as_well(losses):
    # The first has learnt something, by luck, and would be the best.
    begun = _search.begin()._replace(trial=jnp.int32(1), results=known(0.5, filler=np.inf))
    state, _ = try_rate(begun, losses)
    assert np.isinf(state.results).all() and (state.stage, state.trial) == (_search.TRIAL, 2)
    state, _ = try_rate(state, np.full(LENGTHS.trial + 1, 0.6))
    np.testing.assert_allclose(state.results[2], 0.6, rtol=1e-6)
    assert np.isinf(state.results[:2]).all()


def test_where_nothing_is_learnt_the_time_runs_out_and_a_low_rate_is_taken():
    lengths = LENGTHS._replace(all=200)
    states, _, _ = search(lambda rate: jnp.where(rate > 1e-6, -1.0, 0.0), lengths=lengths)
    assert states.stage[-1] == _search.FOUND
    assert states.seen[-1] >= 200 and np.asarray(states.stage)[230] == _search.FOUND
    assert 0 < states.found[-1] < states.edge[-1]


def test_losses_that_are_not_finite_end_the_ramp_and_a_trial_at_once():
    drop = lambda rate: jnp.where(rate > 0.1, -jnp.nan, bowl(0.01, 10.0)(rate))  # noqa: E731
    states, _, _ = search(drop)
    assert states.stage[-1] == _search.FOUND and 0.1 < states.edge[-1] < 0.5
    assert 0.005 < states.found[-1] < 0.02
