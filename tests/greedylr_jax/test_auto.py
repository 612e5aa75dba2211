"""The optimizer without a learning rate: its formula, its invariances, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _auto, auto_lr, get_learning_rate

STEPS = 1000
INNERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "lion": optax.lion(1.0, weight_decay=0.0),
    "adam": optax.adam(1.0, eps=0.0),
}


def regression(loss_unit=1.0, params_unit=1.0):
    """Noisy linear regression in batches of 16: loss function, initial parameters, batches.

    The units are part of the batches, so that one program computes with all of them. Programs that differ in
    constants may differ in their order of additions.
    """
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((STEPS, 16, 5)).astype(np.float32)
    targets = inputs @ np.arange(-2.0, 3.0, dtype=np.float32)
    targets += 0.5 * rng.standard_normal((STEPS, 16)).astype(np.float32)

    def loss_fn(params, batch):
        inputs, targets, loss_unit, params_unit = batch
        weights, bias = params["w"] / params_unit, params["b"] / params_unit
        return loss_unit * jnp.mean((inputs @ weights + bias - targets) ** 2)

    start = {"w": jnp.array([-1.0, -2.0, 1.0, 0.0, 3.0]) * params_unit, "b": jnp.zeros(())}
    units = (np.full(STEPS, unit, np.float32) for unit in (loss_unit, params_unit))
    return loss_fn, start, (inputs, targets, *units)


def train(tx, loss_fn, params, batches):
    """Parameters, state and loss after each step."""

    def body(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, loss)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(body, (params, tx.init(params)), batches)[1]

    return run(params, batches)


@pytest.fixture(scope="module")
def histories():
    return {name: train(auto_lr(inner, total_steps=STEPS), *regression()) for name, inner in INNERS.items()}


@pytest.mark.parametrize("name", INNERS)
def test_it_trains_with_any_optimizer(name, histories):
    losses = histories[name][2]
    # The noise of the targets alone is 0.25.
    assert losses[:10].mean() > 4
    assert losses[-30:].mean() < 0.35


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize(
    ("loss_unit", "params_unit"), [(2.0**-20, 1.0), (2.0**20, 1.0), (1.0, 2.0**-20), (1.0, 2.0**20)]
)
def test_units_that_are_powers_of_two_change_no_bit(name, loss_unit, params_unit, histories):
    """With a nonzero ``eps`` Adam depends on the unit of the gradients itself, so it has none here."""
    tx = auto_lr(INNERS[name], total_steps=STEPS)
    params, state, losses = train(tx, *regression(loss_unit, params_unit))
    expected_params, expected_state, expected_losses = histories[name]
    rates, expected_rates = (jax.vmap(get_learning_rate)(each) for each in (state, expected_state))
    if name in ("lion", "adam"):  # whose updates do not depend on the size of the gradients
        np.testing.assert_array_equal(rates, expected_rates * params_unit)
    np.testing.assert_array_equal(losses, expected_losses * loss_unit)
    np.testing.assert_array_equal(params["w"], expected_params["w"] * params_unit)


@pytest.mark.parametrize("total_steps", [None, STEPS])
def test_it_is_a_chain_with_a_relative_step(total_steps):
    def relative_step(step):
        if total_steps is None:
            return _auto._FREE_RELATIVE_STEP / (1 + step / _auto._DECAY_STEPS)
        warm_up = jnp.minimum((step + 1) / (_auto._WARM_UP * STEPS), 1)
        return _auto._RELATIVE_STEP * warm_up * optax.cosine_decay_schedule(1.0, STEPS)(step)

    chain = optax.chain(INNERS["momentum"], greedylr_jax.scale_to_parameters(relative_step))
    _, state, losses = train(auto_lr(INNERS["momentum"], total_steps=total_steps), *regression())
    _, chain_state, expected = train(chain, *regression())
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert losses[-30:].mean() < 0.5 * losses[:30].mean()
    rates = jax.vmap(get_learning_rate)(state)
    np.testing.assert_allclose(rates, jax.vmap(get_learning_rate)(chain_state), rtol=1e-3)


def updates_of(tx, count, **extra_args):
    """Relative size of each update, with gradients and parameters of one."""

    def body(state, _):
        updates, state = tx.update(jnp.ones(4), state, jnp.ones(4), **extra_args)
        return state, updates[0]

    return -np.asarray(jax.lax.scan(body, tx.init(jnp.ones(4)), length=count)[1])


@pytest.mark.parametrize("extra_args", [{}, {"value": 1.0}, {"has_value": False}, {"value": jnp.nan}])
def test_every_step_counts_whatever_its_loss_and_the_annealing_ends_at_zero(extra_args):
    sizes = updates_of(auto_lr(optax.sgd(1.0), total_steps=100), 130, **extra_args)
    steps = np.arange(130)
    warm_up = np.minimum((steps + 1) / (100 * _auto._WARM_UP), 1)
    expected = 0.5 * (1 + np.cos(np.pi * np.minimum(steps / 100, 1))) * warm_up
    largest = _auto._WITHOUT_MOMENTUM * _auto._RELATIVE_STEP
    np.testing.assert_allclose(sizes, largest * expected, rtol=1e-4, atol=1e-8)
    assert (sizes[100:] == 0).all()


@pytest.mark.parametrize(("total_steps", "largest"), [(None, 0.02), (STEPS, 0.03)])
@pytest.mark.parametrize(("name", "factor"), [("sgd", 3.0), ("momentum", 1.0), ("adam", 1.0)])
def test_steps_are_three_times_as_large_without_momentum(name, factor, total_steps, largest):
    tx = auto_lr(INNERS[name], total_steps=total_steps)
    for init in (tx.init, jax.jit(tx.init)):
        np.testing.assert_allclose(init(jnp.ones(4)).coefficient, factor * largest)


def test_the_inner_optimizer_sees_the_loss():
    tx = auto_lr(optax.chain(optax.sgd(1.0), greedylr_jax.greedy_lr(factor=0.5, patience=0, window=None)))
    state = tx.init(jnp.ones(2))
    for value in (2.0, 1.0, 0.5):
        _, state = tx.update(jnp.ones(2), state, jnp.ones(2), value=value)
    assert greedylr_jax.get_scale(state) == 8.0


@pytest.mark.parametrize("total_steps", [0, 9, 100.5, -3])
def test_a_training_that_is_too_short_is_an_error(total_steps):
    with pytest.raises(ValueError, match="total_steps must be an integer in"):
        auto_lr(optax.sgd(1.0), total_steps=total_steps)
    auto_lr(optax.sgd(1.0), total_steps=10)


def test_an_inner_optimizer_that_ascends_is_an_error():
    with pytest.raises(ValueError, match="auto_lr: inner must be an optimizer"):
        auto_lr(optax.scale_by_adam()).init(jnp.ones(2))


def test_total_steps_may_be_traced_and_leaves_no_tracer(histories):
    with jax.checking_leaks():
        losses = jax.jit(lambda total: train(auto_lr(INNERS["sgd"], total_steps=total), *regression())[2])(
            STEPS
        )
    np.testing.assert_allclose(losses, histories["sgd"][2], rtol=1e-3)


def test_updates_that_are_not_finite_leave_the_parameters_alone():
    tx = auto_lr(optax.sgd(1.0))
    state = tx.init(jnp.ones(2))
    updates, state = tx.update(jnp.array([jnp.inf, 1.0]), state, jnp.ones(2), value=1.0)
    np.testing.assert_array_equal(updates, 0)
    updates, _ = tx.update(jnp.ones(2), state, jnp.ones(2), value=1.0)
    assert (updates < 0).all()


@pytest.mark.parametrize("total_steps", [None, STEPS])
def test_the_compiled_step_has_no_loop_and_no_branch(total_steps):
    params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
    tx = auto_lr(optax.adamw(1.0), total_steps=total_steps)
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert "fusion" in compiled  # the names of operations are where they are looked for
    assert not [name for name in ("while", "conditional") if f" {name}(" in compiled]


def test_the_state_has_no_copy_of_the_parameters():
    params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
    inner = optax.adamw(1.0)
    own, bare = (
        sum(leaf.size for leaf in jax.tree.leaves(tx.init(params)))
        for tx in (auto_lr(inner, total_steps=STEPS), inner)
    )
    assert own - bare == 3 + len(params)  # coefficient, learning rate, step, and the size of each leaf


def test_the_eps_of_adam_breaks_the_invariance_to_the_unit_of_the_loss():
    """With gradients far below ``eps`` Adam is momentum; with ``eps=0`` the updates have no unit."""

    def first_update(eps, unit):
        tx = auto_lr(optax.adam(1.0, eps=eps))
        params = jnp.ones(2)
        return tx.update(unit * jnp.array([1.0, 4.0]), tx.init(params), params)[0]

    np.testing.assert_array_equal(first_update(0.0, 2.0**-40), first_update(0.0, 1.0))
    small = first_update(1e-8, 2.0**-40)
    np.testing.assert_allclose(small[1] / small[0], 4.0, rtol=1e-3)
    np.testing.assert_allclose(jnp.std(first_update(1e-8, 1.0)), 0, atol=1e-6)
