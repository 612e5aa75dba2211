"""The ARC rule: decides at the end of each cycle as the network says, and as whole histories would have
it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax.arc import ACTIONS, action_probabilities, arc, arc_schedule, batch_features, initial_weights
from greedylr_jax.arc._controller import MULTIPLIERS

STEPS, CYCLES, RATE = 7, 12, 0.125


def weights_for(action):
    """A network that always does the same."""
    weights = initial_weights(jax.random.key(0))
    bias = jnp.zeros(3).at[ACTIONS.index(action)].set(10.0)
    return weights | {"dense_1/kernel": jnp.zeros_like(weights["dense_1/kernel"]), "dense_1/bias": bias}


def lively_weights():
    """A network whose decisions differ from cycle to cycle."""
    return {name: 4.0 * array for name, array in initial_weights(jax.random.key(0)).items()}


@functools.partial(jax.jit, static_argnames=("validation", "passes"))
def compiled(weights, losses, given, *, validation, passes):
    """Rates and actions after each loss; the weights are an input, so that tests share compilations."""
    schedule = arc_schedule(0.125, weights, steps_per_cycle=STEPS, validation=validation)

    def body(state, inputs):
        loss, value = inputs
        state = schedule.update(state, value=loss, **({"validation_value": value} if passes else {}))
        return state, (schedule(state), state.rule_state.rule.action)

    state, (rates, actions) = jax.lax.scan(body, schedule.init(), (losses, given))
    return rates, actions, state


def run(weights, losses, given=None, validation=True):
    """The same for a training of any number of cycles up to :data:`CYCLES`."""
    count = len(losses)
    padded = np.concatenate([losses, np.ones(CYCLES * STEPS - count)]).astype(np.float32)
    values = np.full(CYCLES * STEPS, np.nan, np.float32)
    if given is not None:
        values[:count] = given
    rates, actions, state = compiled(weights, padded, values, validation=validation, passes=given is not None)
    return np.asarray(rates)[:count], np.asarray(actions)[:count], state


@pytest.mark.parametrize(("action", "multiplier"), [("raise", 1.618), ("keep", 1.0), ("lower", 0.618)])
def test_the_rate_changes_at_the_end_of_each_cycle(action, multiplier):
    rates, actions, _ = run(weights_for(action), np.linspace(3, 1, 3 * STEPS))
    # The loss that ends a cycle already acts on the update of its step.
    np.testing.assert_allclose(rates[: STEPS - 1], RATE)
    for cycle in range(1, 4):
        np.testing.assert_allclose(rates[cycle * STEPS - 1], RATE * multiplier**cycle, rtol=1e-6)
    np.testing.assert_allclose(rates[2 * STEPS : 3 * STEPS - 1], RATE * multiplier**2, rtol=1e-6)
    assert (actions[STEPS - 1 :] == ACTIONS.index(action)).all()
    assert MULTIPLIERS[ACTIONS.index(action)] == multiplier


@pytest.mark.parametrize("validation", [pytest.param(True, marks=pytest.mark.slow), False])
def test_decisions_are_those_of_whole_histories(validation):
    rng = np.random.default_rng(3)
    cycles, weights = CYCLES, lively_weights()
    losses = (np.linspace(3, 1, cycles * STEPS) + 0.3 * rng.standard_normal(cycles * STEPS)).astype(
        np.float32
    )
    given = np.where(rng.uniform(size=len(losses)) < 0.4, rng.uniform(size=len(losses)), np.nan).astype(
        np.float32
    )
    rates, actions, _ = run(weights, losses, given, validation)

    rate, ends, taken = np.float32(RATE), [], []
    for cycle in range(cycles):
        ends.append(rate)
        blocks = [np.s_[i * STEPS : (i + 1) * STEPS] for i in range(cycle + 1)]
        seen = [given[block][~np.isnan(given[block])] if validation else [] for block in blocks]
        features = batch_features([losses[block] for block in blocks], seen, ends)
        taken.append(int(np.argmax(action_probabilities(weights, features))))
        rate = np.float32(rate * np.float32(MULTIPLIERS[taken[-1]]))
    assert set(taken) == {0, 1, 2}
    np.testing.assert_array_equal(actions[STEPS - 1 :: STEPS], taken)
    np.testing.assert_allclose(rates[-1], rate, rtol=1e-6)


@pytest.mark.parametrize("action", ["raise", "lower"])
def test_the_scale_stays_within_its_bounds(action):
    weights = weights_for(action)

    @jax.jit
    def final(low, high):  # traced bounds
        tx = arc(weights, steps_per_cycle=2, min_scale=low, max_scale=high)
        step = lambda state, value: (tx.update(None, state, value=value)[1], None)  # noqa: E731
        return greedylr_jax.get_scale(jax.lax.scan(step, tx.init(None), jnp.ones(20))[0])

    bound, unbounded = (3.0, 1.618**10) if action == "raise" else (0.25, 0.618**10)
    assert final(0.25, 3.0) == np.float32(bound)
    np.testing.assert_allclose(final(0.0, jnp.inf), unbounded, rtol=1e-5)

    rates = {"min_learning_rate": 0.25 * RATE, "max_learning_rate": 3.0 * RATE}
    schedule = arc_schedule(RATE, weights, steps_per_cycle=2, **rates)
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 20, lambda _, s: schedule.update(s, value=1.0), state))
    assert schedule(state(schedule.init())) == np.float32(bound * RATE)


def test_a_schedule_that_starts_outside_its_bounds_is_refused():
    with pytest.raises(ValueError, match="init_value must not exceed max_learning_rate"):
        arc_schedule(0.5, weights_for("keep"), steps_per_cycle=2, max_learning_rate=0.25)


def test_without_validation_losses_the_network_sees_zeros():
    losses = np.random.default_rng(0).uniform(1, 2, 6 * STEPS)
    given = np.full(6 * STEPS, np.nan)
    given[2::STEPS], given[4::STEPS] = 0.7, 0.4
    weights = lively_weights()
    blind, _, _ = run(weights, losses, given, validation=False)
    absent, _, _ = run(weights, losses)
    none, _, _ = run(weights, losses, np.full(6 * STEPS, np.nan))
    seeing, _, _ = run(weights, losses, given)
    np.testing.assert_array_equal(absent, blind)
    np.testing.assert_array_equal(none, blind)
    assert (seeing != blind).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_lowers_the_rate_once_and_affects_nothing_else(bad):
    losses = np.linspace(3, 1, 6 * STEPS)
    losses[STEPS + 2] = bad
    rates, actions, state = run(weights_for("raise"), losses)
    assert actions[STEPS - 1 :: STEPS].tolist() == [0, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(rates[-1], RATE * 1.618**5 * 0.618, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.rule_state.rule.history))
    # Right from the start, before any finite loss.
    rates, _, _ = run(weights_for("raise"), np.full(2 * STEPS, bad))
    np.testing.assert_allclose(rates[-1], RATE * 0.618**2, rtol=1e-5)


def test_both_adapters_agree_to_the_bit_and_chain_moves_the_rule():
    losses = np.random.default_rng(1).uniform(1, 3, 5 * STEPS).astype(np.float32)
    weights = lively_weights()
    expected, _, _ = run(weights, losses)
    tx = greedylr_jax.chain(arc(weights, steps_per_cycle=STEPS), optax.sgd(RATE))

    def body(state, loss):
        updates, state = tx.update(jnp.ones(1), state, value=loss)
        return state, -updates[0]

    _, got = jax.jit(lambda losses: jax.lax.scan(body, tx.init(jnp.ones(1)), losses))(losses)
    np.testing.assert_array_equal(got, expected)
    greedylr_jax.assert_controls_learning_rate(tx, jnp.ones(1))


def test_the_state_is_of_a_fixed_size_and_a_step_moves_no_data():
    for steps in (10, 10_000):
        tx = arc(weights_for("keep"), steps_per_cycle=steps)
        state = tx.init(jnp.ones(3))
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * 600 + 100
    step = jax.jit(lambda g, s, loss: tx.update(g, s, value=loss, validation_value=loss))
    arguments = jax.device_put((jnp.ones(3), state, jnp.float32(1.0)))
    step(*arguments)
    with jax.transfer_guard("disallow"):
        _, state = step(*arguments)
    assert int(state.rule.step) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_cycle": 1}, "steps_per_cycle must be"),
        ({"steps_per_cycle": 2.5}, "steps_per_cycle must be"),
        ({"steps_per_cycle": 5, "max_validations": 0}, "max_validations must be"),
        ({"steps_per_cycle": 5, "every": 0}, "every must be"),
        ({"steps_per_cycle": 5, "weights": {}}, "weights lack"),
        ({"steps_per_cycle": 5, "min_scale": -1.0}, r"min_scale must be a number in \[0, inf\)"),
        ({"steps_per_cycle": 5, "min_scale": 2.0}, "min_scale must not exceed the initial scale"),
        ({"steps_per_cycle": 5, "max_scale": 0.5}, "the initial scale must not exceed max_scale"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        arc(**{"weights": weights_for("keep")} | settings)


def test_a_validation_loss_that_is_no_scalar_is_refused():
    tx = arc(weights_for("keep"), steps_per_cycle=5)
    with pytest.raises(ValueError, match="validation_value must be a scalar"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=1.0, validation_value=jnp.ones(2))
