"""Setting the scale and the learning rate by hand, for every rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from greedylr_jax import (
    get_learning_rate,
    get_scale,
    greedy_lr,
    greedy_lr_schedule,
    set_learning_rate,
    set_scale,
)
from tests.greedylr_jax.rules import BASE_RATE, RATE_OPTIMIZERS, losses, rule_parameters

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.ones(2)}
GRADS = {"w": jnp.linspace(0.5, 1.0, 6), "b": -jnp.ones(2)}
VALUES = losses(2)

every_rule = pytest.mark.parametrize("case", rule_parameters())
every_adapter = pytest.mark.parametrize("adapter", ["transformation", "schedule"])


def loss_fn(params):
    return sum(jnp.sum(jnp.square(leaf - 0.5)) for leaf in jax.tree.leaves(params))


def with_rule(case, adapter):
    if adapter == "schedule":
        return optax.inject_hyperparams(optax.sgd)(learning_rate=case.schedule())
    return optax.chain(optax.sgd(BASE_RATE), case.transformation())


def stepper(tx):
    """A compiled step on ``PARAMS`` that gives updates and state."""
    tx = optax.with_extra_args_support(tx)
    return jax.jit(
        lambda state, value, has_value: tx.update(
            GRADS, state, PARAMS, value=value, has_value=has_value, value_fn=loss_fn
        )
    )


def after(tx, values):
    step, state = stepper(tx), tx.init(PARAMS)
    for value in values:
        _, state = step(state, value, True)
    return step, state


@every_rule
@every_adapter
def test_the_next_step_uses_the_scale_and_the_rule_continues_from_it(case, adapter):
    step, state = after(with_rule(case, adapter), VALUES)
    scale = get_scale(state)
    changed = jax.jit(set_scale)(state, 2 * scale)
    chex.assert_trees_all_equal_shapes_and_dtypes(changed, state)
    assert get_scale(changed) == 2 * scale
    updates, after_nothing = step(changed, 0.0, False)  # without a loss the rule keeps the scale
    assert get_scale(after_nothing) == 2 * scale
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -BASE_RATE * 2 * scale * g, GRADS), rtol=1e-6)
    if case.name != "arc":  # which decides on the history of its rates, too
        (_, expected), (_, got) = (step(each, VALUES[-1], True) for each in (state, changed))
        low, high = case.bounds
        assert get_scale(got) == np.clip(2 * get_scale(expected), low, high)


@every_rule
@every_adapter
def test_the_next_step_uses_the_learning_rate(case, adapter):
    step, state = after(with_rule(case, adapter), VALUES[:1])
    changed = set_learning_rate(state, 0.5, None if adapter == "schedule" else BASE_RATE)
    assert get_learning_rate(changed, BASE_RATE) == 0.5
    if adapter == "schedule":
        assert changed.hyperparams["learning_rate"] == 0.5
    updates, _ = step(changed, 0.0, False)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.5 * g, GRADS), rtol=1e-6)


WITH_RATE = [name for name in RATE_OPTIMIZERS if name not in ("factor_polling", "auto_lr")]


@pytest.mark.parametrize("name", WITH_RATE)
def test_an_optimizer_with_its_own_rate_continues_from_the_rate(name):
    step, state = after(RATE_OPTIMIZERS[name], [])
    groups = sorted(state.rate.learning_rate) if name == "hypergradient-group" else [None]
    changed = state
    for group in groups:
        changed = jax.jit(set_learning_rate, static_argnames="group")(changed, 0.02, group=group)
    chex.assert_trees_all_equal_shapes_and_dtypes(changed, state)
    (updates, expected), (moved, got) = (step(each, jnp.float32(5.0), True) for each in (state, changed))
    for group in groups:
        before, now = (get_learning_rate(each, group=group) for each in (expected, got))
        chex.assert_trees_all_close(now, jax.tree.map(lambda rate: 2 * rate, before), rtol=1e-5)
    chex.assert_trees_all_close(moved, jax.tree.map(lambda update: 2 * update, updates), rtol=1e-4)


def test_a_rate_that_is_computed_at_each_step_cannot_be_set_but_scaled():
    with pytest.raises(ValueError, match="cannot be set, because it is computed anew at each step"):
        set_learning_rate(RATE_OPTIMIZERS["auto_lr"].init(PARAMS), 0.02)
    step, state = after(optax.chain(RATE_OPTIMIZERS["auto_lr"], greedy_lr()), [])
    updates, expected = step(state, jnp.float32(5.0), True)
    halved, got = step(set_scale(state, 0.5), jnp.float32(5.0), True)
    chex.assert_trees_all_close(halved, jax.tree.map(lambda update: 0.5 * update, updates))
    chex.assert_trees_all_close(get_learning_rate(got), 0.5 * get_learning_rate(expected))


def test_factor_polling_continues_from_the_scale():
    step, state = after(RATE_OPTIMIZERS["factor_polling"], [])
    (updates, _), (moved, got) = (
        step(each, jnp.float32(5.0), False) for each in (state, set_scale(state, 2.0))
    )
    assert get_scale(got) == 2.0
    chex.assert_trees_all_close(moved, jax.tree.map(lambda update: 2 * update, updates))


def test_rates_for_each_element_are_set_by_a_number_or_by_a_pytree():
    tx = RATE_OPTIMIZERS["hypergradient-parameter"]
    state = tx.init(PARAMS)
    filled = get_learning_rate(set_learning_rate(state, 0.5))
    chex.assert_trees_all_equal(filled, jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), PARAMS))
    rates = jax.tree.map(lambda leaf: jnp.arange(1.0, 1.0 + leaf.size), PARAMS)
    chex.assert_trees_all_equal(get_learning_rate(set_learning_rate(state, rates)), rates)


def test_groups_are_set_by_name():
    rule = greedy_lr(patience=0)
    schedule = greedy_lr_schedule(0.25, min_learning_rate=0.025, max_learning_rate=2.5)
    tx = optax.partition(
        {"slow": optax.chain(optax.sgd(1.0), rule), "fast": optax.inject_hyperparams(optax.sgd)(schedule)},
        {"w": "slow", "b": "fast"},
    )
    state = set_learning_rate(set_scale(tx.init(PARAMS), 3.0, group="slow"), 0.5, group="fast")
    assert get_scale(state, group="slow") == 3.0
    assert get_learning_rate(state, group="fast") == 0.5
    assert get_scale(state, group="fast") == 2.0
    with pytest.raises(ValueError, match="group='other' matches 0"):
        set_scale(state, 1.0, group="other")


def test_a_schedule_and_its_scale():
    tx = optax.inject_hyperparams(optax.sgd)(
        greedy_lr_schedule(0.25, min_learning_rate=0.025, max_learning_rate=2.5)
    )
    assert get_learning_rate(set_scale(tx.init(PARAMS), 4.0)) == 1.0


def test_the_other_parts_of_the_state_do_not_change():
    tx = optax.chain(optax.adam(0.1), greedy_lr())
    _, state = after(tx, VALUES)
    changed = set_scale(state, 3.0)
    chex.assert_trees_all_equal(changed[0], state[0])
    before, now = (each[1].rule._asdict() for each in (state, changed))
    assert before.pop("scale") != now.pop("scale")
    chex.assert_trees_all_equal(now, before)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, "1", jnp.ones(2)])
def test_a_scale_or_rate_out_of_range_is_refused(value):
    state = greedy_lr().init(PARAMS)
    with pytest.raises(ValueError, match="scale must be a"):
        set_scale(state, value)
    with pytest.raises(ValueError, match="learning_rate must be a"):
        set_learning_rate(state, value, 0.1)


def test_what_cannot_be_set_is_explained():
    plain = optax.adam(0.1).init(PARAMS)
    for setter in (set_scale, set_learning_rate):
        with pytest.raises(ValueError, match="holds no learning-rate rule"):
            setter(plain, 1.0)
    chained = optax.chain(optax.adam(0.1), greedy_lr()).init(PARAMS)
    with pytest.raises(ValueError, match="base_learning_rate is needed"):
        set_learning_rate(chained, 1.0)
    with pytest.raises(ValueError, match="must be scalars"):
        set_learning_rate(chained, {"w": 1.0}, 0.1)
    hybrid = optax.chain(RATE_OPTIMIZERS["hypergradient-parameter"], greedy_lr()).init(PARAMS)
    with pytest.raises(ValueError, match=r"must be scalars.*set_scale"):
        set_learning_rate(hybrid, 1.0)


def test_the_base_rate_of_a_rule_may_be_in_the_state():
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=0.125), greedy_lr())
    assert get_scale(set_learning_rate(tx.init(PARAMS), 0.5)) == 4.0


def mean_square(model, x):
    return jnp.mean(model(x) ** 2)


@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_the_rate_of_an_nnx_optimizer_is_set(adapter):
    schedule = greedy_lr_schedule(0.125, min_learning_rate=0.01, max_learning_rate=4.0)
    tx = {
        "transformation": optax.chain(optax.sgd(0.125), greedy_lr()),
        "schedule": optax.inject_hyperparams(optax.sgd)(schedule),
    }[adapter]
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.opt_state = set_learning_rate(optimizer.opt_state, 0.5, 0.125)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(mean_square)(model, x)
        optimizer.update(model, grads, value=loss)
        return grads

    kernel = model.kernel[...]
    grads = step(model, optimizer, jnp.ones((4, 3)))
    np.testing.assert_allclose(model.kernel[...], kernel - 0.5 * grads["kernel"][...], rtol=1e-6)
    assert f"{get_learning_rate(optimizer.opt_state, 0.125):.3f}" == "0.500"
