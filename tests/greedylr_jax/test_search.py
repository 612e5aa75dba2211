"""The search for a rate, on losses that are known functions of the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedylr_jax import _search

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


def test_trials_are_half_a_decade_apart_and_end_two_after_the_best(history):
    states, _, rates = history
    trials, tries = np.asarray(states.trial), np.asarray(states.stage) == _search.TRIAL
    edge = float(states.edge[-1])
    for trial in range(trials.max() + 1):
        own = np.asarray(rates)[tries & (trials == trial)]
        np.testing.assert_allclose(own, edge * 10 ** (-0.5 * (trial + 1)), rtol=1e-5)
    results = np.asarray(states.results[-1])
    assert np.argmin(results) == trials.max() - 2
    assert np.isinf(results[trials.max() + 1 :]).all()


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
