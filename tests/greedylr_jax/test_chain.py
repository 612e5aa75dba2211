"""greedylr_jax.chain, and the check that a rule controls the learning rate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import assert_controls_learning_rate, greedy_lr, greedy_lr_schedule
from tests.greedylr_jax.rules import losses

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.zeros(4)}
RULE = dict(factor=0.5, patience=1, window=3)


def trajectory(tx):
    """Parameters after every step of a run whose gradients follow the parameters."""

    def body(carry, value):
        params, state = carry
        grads = jax.tree.map(lambda leaf: leaf + 0.25, params)
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.jit(lambda values: jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), values))(
        losses(48)
    )
    return history, state


RIGHT_ORDER = optax.chain(optax.adamw(1e-3), greedy_lr(**RULE))
SAME_AS_RIGHT_ORDER = {
    "rule first": greedylr_jax.chain(greedy_lr(**RULE), optax.adamw(1e-3)),
    "rule last": greedylr_jax.chain(optax.adamw(1e-3), greedy_lr(**RULE)),
    "rule in the middle": greedylr_jax.chain(
        optax.scale_by_adam(), greedy_lr(**RULE), optax.add_decayed_weights(1e-4), optax.scale(-1e-3)
    ),
    "nested": greedylr_jax.chain(greedylr_jax.chain(greedy_lr(**RULE), optax.identity()), optax.adamw(1e-3)),
}


@pytest.mark.parametrize("name", SAME_AS_RIGHT_ORDER)
def test_chain_gives_the_trajectory_of_the_right_order(name):
    expected, expected_state = trajectory(RIGHT_ORDER)
    got, state = trajectory(SAME_AS_RIGHT_ORDER[name])
    chex.assert_trees_all_equal(got, expected)
    assert greedylr_jax.get_scale(state) == greedylr_jax.get_scale(expected_state) != 1


def test_chain_has_the_state_of_the_right_order():
    chained = greedylr_jax.chain(greedy_lr(**RULE), optax.adamw(1e-3))
    chex.assert_trees_all_equal_structs(chained.init(PARAMS), RIGHT_ORDER.init(PARAMS))


def test_plain_optax_order_would_not_control_the_rate():
    """With Adam the two orders differ: in the wrong one the rule has hardly any effect."""
    expected, _ = trajectory(RIGHT_ORDER)
    wrong, _ = trajectory(optax.chain(greedy_lr(**RULE), optax.adamw(1e-3)))
    assert not np.allclose(wrong["w"][-1], expected["w"][-1], rtol=1e-3)


def test_chain_without_rules_is_optax_chain():
    transforms = (optax.clip(0.1), optax.adamw(1e-3))
    chex.assert_trees_all_equal(
        trajectory(greedylr_jax.chain(*transforms)), trajectory(optax.chain(*transforms))
    )
    assert greedylr_jax.chain().update({"w": 1.0}, greedylr_jax.chain().init(None))[0] == {"w": 1.0}


def test_several_rules_multiply():
    tx = greedylr_jax.chain(greedy_lr(**RULE), optax.sgd(1.0), greedy_lr(factor=0.25, patience=0))
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    updates, state = tx.update(PARAMS, state, PARAMS, value=0.5)
    product = np.prod([float(rule.rule.scale) for rule in state[1:]])
    assert product == 2.0 * 10.0
    np.testing.assert_allclose(updates["w"], -product * PARAMS["w"], rtol=1e-6)


@pytest.mark.parametrize("argument", [1e-3, optax.cosine_decay_schedule(1.0, 10), None, (1, 2)])
def test_chain_rejects_what_is_no_transformation(argument):
    with pytest.raises(TypeError) as raised:
        greedylr_jax.chain(optax.adamw(1e-3), argument)
    assert str(raised.value) == (
        f"argument 1 of chain must be an optax.GradientTransformation, got {argument!r}. "
        "A schedule goes into the optimizer, as its learning_rate."
    )


SCHEDULE = greedy_lr_schedule(1e-3, min_learning_rate=1e-4, max_learning_rate=1e-2)
IN_CONTROL = SAME_AS_RIGHT_ORDER | {
    "right order": RIGHT_ORDER,
    "schedule": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "schedule in a chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE)
    ),
    "before plain SGD": optax.chain(greedy_lr(), optax.sgd(0.1)),
    "after momentum": optax.chain(optax.sgd(0.1, momentum=0.9), greedy_lr()),
    "multi steps": optax.MultiSteps(RIGHT_ORDER, 3),
    "multi steps as a transformation": optax.MultiSteps(RIGHT_ORDER, 3).gradient_transformation(),
    "masked": optax.chain(optax.adamw(1e-3), optax.masked(greedy_lr(), {"w": True, "b": False})),
    "partition": optax.partition(
        {"w": RIGHT_ORDER, "b": optax.chain(optax.sgd(0.1), greedy_lr())}, {"w": "w", "b": "b"}
    ),
    "after a warmup schedule": optax.chain(
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)), greedy_lr()
    ),
}
NOT_IN_CONTROL = {
    "before Adam": optax.chain(greedy_lr(), optax.adamw(1e-3)),
    "before momentum": optax.chain(greedy_lr(), optax.sgd(0.1, momentum=0.9)),
    "before Lion": optax.chain(greedy_lr(), optax.lion(1e-3)),
    "before clipping": optax.chain(greedy_lr(), optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "masked, before Adam": greedylr_jax.chain(
        optax.masked(greedy_lr(), {"w": True, "b": True}), optax.adamw(1e-3)
    ),
    "one group of two": optax.partition(
        {"w": RIGHT_ORDER, "b": optax.chain(greedy_lr(), optax.adam(0.1))}, {"w": "w", "b": "b"}
    ),
    "wrong hyperparameter": optax.inject_hyperparams(optax.adamw)(
        learning_rate=1e-3, eps=greedy_lr_schedule(1e-8, min_learning_rate=1e-9, max_learning_rate=1e-7)
    ),
}


@pytest.mark.parametrize("name", IN_CONTROL)
def test_a_rule_in_control_passes(name):
    assert assert_controls_learning_rate(IN_CONTROL[name], PARAMS) is None


@pytest.mark.parametrize("name", NOT_IN_CONTROL)
def test_a_rule_that_is_not_in_control_is_an_error_with_the_right_order(name):
    with pytest.raises(AssertionError, match=r"opt_state.*Put it after the optimizer.*greedylr_jax.chain"):
        assert_controls_learning_rate(NOT_IN_CONTROL[name], PARAMS)


def test_a_transformation_without_a_rule_is_an_error():
    with pytest.raises(AssertionError, match="holds no learning-rate rule"):
        assert_controls_learning_rate(optax.adamw(1e-3), PARAMS)


def test_a_transformation_that_never_moves_is_an_error():
    with pytest.raises(AssertionError, match="zero updates"):
        assert_controls_learning_rate(optax.chain(optax.set_to_zero(), greedy_lr()), {"w": jnp.ones(1)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_control_is_seen_in_any_dtype(dtype):
    params = {"w": jnp.ones(5, dtype), "steps": jnp.arange(2)}
    assert_controls_learning_rate(optax.chain(optax.sgd(0.1), greedy_lr()), params)
