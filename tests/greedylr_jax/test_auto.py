"""The rule that needs no initial rate: its ramp, the way back, and what it reaches from any rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import auto, auto_lr, get_learning_rate

RAMP, STEPS = 60, 300


def regression(seed=0):
    """Noisy linear regression in batches of 16: loss function, first parameters, batches."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((STEPS, 16, 5)).astype(np.float32)
    targets = inputs @ np.arange(1.0, 6.0, dtype=np.float32)
    targets += 0.5 * rng.standard_normal((STEPS, 16)).astype(np.float32)

    def loss_fn(params, batch):
        return jnp.mean((batch[0] @ params["w"] + params["b"] - batch[1]) ** 2)

    return loss_fn, {"w": jnp.full(5, 0.1), "b": jnp.zeros(())}, (inputs, targets)


def train(tx, loss_fn, params, batches):
    """Everything after each step: parameters, state and loss."""

    def body(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, loss)

    return jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), batches)[1])(params)


@pytest.mark.parametrize("inner", [optax.identity(), optax.scale_by_adam()], ids=["sgd", "adam"])
def test_the_result_does_not_depend_on_the_initial_rate(inner):
    task = regression()

    def losses(rate):
        return train(auto_lr(inner, rate, total_steps=STEPS, ramp_steps=RAMP), *task)[2]

    got = np.asarray(jax.lax.map(losses, jnp.array([1e-4, 1e-2, 1.0, 1e2])))  # one compilation
    # The noise of the targets alone is 0.25; the loss starts above 50.
    assert got[:, -30:].mean(axis=1).max() < 0.32


@pytest.fixture(scope="module")
def history():
    tx = auto_lr(optax.scale_by_adam(), 0.01, total_steps=STEPS, ramp_steps=RAMP)
    return train(tx, *regression())


def test_the_ramp_rises_over_ten_decades_and_then_leads_back_to_the_start(history):
    params, states, losses = history
    rates, phases = np.asarray(states.rate.learning_rate), np.asarray(states.phase)
    ramp = np.flatnonzero(phases == auto.RAMP)
    np.testing.assert_allclose(rates[ramp], 0.01 * 10.0 ** (-6 + 10 * ramp / (RAMP - 1)), rtol=1e-4)
    # It ends as the loss has risen above where it began, or after all its steps.
    end = ramp[-1] + 1
    assert end == RAMP or losses[end] > losses[:10].mean()
    start = regression()[1]
    first = np.flatnonzero(phases == auto.TRAIN)[0]
    for name, value in start.items():
        np.testing.assert_array_equal(params[name][first - 1], value)
    fresh = optax.scale_by_adam().init(start)
    kept = jax.tree.map(lambda leaf: leaf[first - 1], states.inner_state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), kept, fresh)))
    # A tenth of the rate whose loss was least, by means of seven; the loss is that before the step.
    seen = np.asarray(losses[: end + 1], float)
    means = [seen[max(0, i - 3) : i + 4].mean() for i in range(len(seen))]
    best = max(int(np.argmin(means)) - 1, 0)
    np.testing.assert_allclose(states.found[-1], 0.1 * rates[best], rtol=1e-4)


def test_after_the_ramp_the_trend_rule_acts_and_the_rate_falls_to_zero_at_the_end(history):
    _, states, losses = history
    rates, phases = np.asarray(states.rate.learning_rate), np.asarray(states.phase)
    first = np.flatnonzero(phases == auto.TRAIN)[0]
    tx = greedylr_jax.trend_lr(max_scale=10.0)
    state, scales = tx.init(None), []
    for loss in np.asarray(losses[first + 1 :]):
        _, state = tx.update(None, state, value=loss)
        scales.append(float(greedylr_jax.get_scale(state)))
    anneal = np.clip((STEPS - np.arange(first + 1, STEPS)) / (0.2 * STEPS), 0, 1)
    np.testing.assert_allclose(rates[first + 1 :], states.found[-1] * np.array(scales) * anneal, rtol=1e-4)
    assert 0 < rates[-1] < 0.03 * rates[first + 1 :].max() and np.ptp(scales) > 0


def test_without_a_horizon_the_rate_does_not_fall_by_itself():
    _, states, _ = train(auto_lr(optax.identity(), 0.1, ramp_steps=RAMP), *regression())
    rates = np.asarray(states.rate.learning_rate)
    np.testing.assert_allclose(rates[-1], states.found[-1] * states.trend.scale[-1], rtol=1e-6)


def test_a_ramp_that_blows_up_leaves_nothing_that_is_not_finite():
    loss_fn = lambda params, batch: jnp.sum(jnp.exp(params["w"] ** 2)) + 0 * jnp.sum(batch)  # noqa: E731
    params = {"w": jnp.array([1.5, -1.0, 0.5])}
    tx = auto_lr(optax.identity(), 1e3, ramp_steps=RAMP)
    params, states, losses = train(tx, loss_fn, params, jnp.zeros(STEPS))
    # It blew up, and once more from the start, at the rate of the flat bottom.
    assert np.max(losses) > 1e10 and states.num_returns[-1] == 2
    assert np.isfinite(params["w"]).all() and losses[-1] < 3.01  # the minimum is 3


def test_steps_without_a_loss_are_not_counted():
    loss_fn, params, batches = regression()
    tx = auto_lr(optax.identity(), 0.1, ramp_steps=RAMP)
    state = tx.init(params)
    grads = jax.grad(loss_fn)(params, jax.tree.map(lambda rows: rows[0], batches))
    for has_value in (False, jnp.asarray(False)):
        value = {} if has_value is False else {"value": 7.0}
        _, after = tx.update(grads, state, params, has_value=has_value, **value)
        assert after.step == 0 and after.losses[0] == 0
        assert get_learning_rate(after) == get_learning_rate(state)


def test_an_optimizer_built_with_rate_one_is_taken_as_a_direction():
    finals = [
        train(auto_lr(inner, 0.1, total_steps=STEPS, ramp_steps=RAMP), *regression())[0]["w"][-1]
        for inner in (optax.adam(1.0), optax.scale_by_adam())
    ]
    np.testing.assert_allclose(*finals, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"total_steps": 0}, "total_steps"),
        ({"ramp_steps": 29}, "ramp_steps"),
        ({"ramp_steps": 50.5}, "ramp_steps"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        auto_lr(optax.identity(), **arguments)


def test_the_parameters_and_the_loss_are_asked_for():
    tx = auto_lr(optax.identity())
    state = tx.init(jnp.ones(2))
    with pytest.raises(TypeError, match="needs the parameters"):
        tx.update(jnp.ones(2), state, value=1.0)
    with pytest.raises(TypeError, match="value=loss"):
        tx.update(jnp.ones(2), state, jnp.ones(2))


@pytest.mark.parametrize(("total", "longest"), [(None, 150), (10_000, 150), (400, 60), (50, 30)])
def test_the_ramp_is_a_share_of_the_training(total, longest):
    state = auto_lr(optax.identity(), total_steps=total).init(jnp.ones(2))
    assert len(state.losses) == longest + 1
