"""greedylr_jax.chain, and the check that a rule controls the learning rate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import greedylr_jax
from greedylr_jax import assert_controls_learning_rate, greedy_lr, greedy_lr_schedule
from tests.greedylr_jax.rules import losses, thinned

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


@pytest.mark.filterwarnings("ignore::greedylr_jax.MisplacedRuleWarning")
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
WRAPPED = {  # wrappers with iterates of their own, around a chain of an optimizer and a rule
    "schedule_free": lambda inner: contrib.schedule_free(inner, 0.1),
    "schedule_free with b1=0.5": lambda inner: contrib.schedule_free(inner, 0.1, b1=0.5),
    "mechanize": contrib.mechanize,
    "with_rollback": greedylr_jax.with_rollback,
    "lr_tuner": lambda inner: greedylr_jax.lr_tuner(inner, 0.1, explore_steps=3, recompute_every=3),
}
IN_CONTROL = (
    SAME_AS_RIGHT_ORDER
    | {
        f"inside {name}, {kind}": wrap(optax.chain(inner, greedy_lr()))
        for name, wrap in WRAPPED.items()
        for kind, inner in {"sgd": optax.sgd(1.0), "adam": optax.adam(1.0)}.items()
    }
    | {
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
        "after prodigy": optax.chain(contrib.prodigy(), greedy_lr()),
        "after dog": optax.chain(contrib.dog(), greedy_lr()),
        "hybrid": optax.chain(greedylr_jax.hypergradient(optax.sgd(1.0), 0.1, 1e-3), greedy_lr()),
    }
)
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
} | {
    f"inside {name}, before {kind}": wrap(optax.chain(greedy_lr(), inner))
    for name, wrap in WRAPPED.items()
    for kind, inner in {"momentum": optax.sgd(1.0, momentum=0.9), "adam": optax.adam(1.0)}.items()
}
MUST_NOT_BE_SCALED = {name: wrap(optax.sgd(1.0)) for name, wrap in WRAPPED.items()} | {
    "sam": contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "lookahead": optax.lookahead(optax.sgd(0.1), 3, 0.5),
    "cocob": contrib.cocob(),
    "madgrad": contrib.madgrad(0.1),
    "schedule_free in a chain": optax.chain(optax.clip(1.0), contrib.schedule_free(optax.sgd(0.1), 0.1)),
    "schedule_free in a partition": optax.partition(
        {"w": contrib.schedule_free(optax.sgd(0.1), 0.1), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}
    ),
}


def params_for(name):
    return optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS


@pytest.mark.parametrize("name", MUST_NOT_BE_SCALED)
def test_a_rule_after_an_optimizer_that_must_not_be_scaled_is_an_error(name):
    tx = optax.chain(MUST_NOT_BE_SCALED[name], greedy_lr())
    with pytest.raises(AssertionError, match=r"opt_state\[1\] .* must not be scaled. Put the rule inside"):
        assert_controls_learning_rate(tx, params_for(name))


@pytest.mark.parametrize("name", MUST_NOT_BE_SCALED)
def test_chain_refuses_to_scale_an_optimizer_that_must_not_be_scaled(name):
    tx = greedylr_jax.chain(greedy_lr(), MUST_NOT_BE_SCALED[name])
    with pytest.raises(ValueError, match=r"must not be scaled. Put the rule inside"):
        tx.init(params_for(name))
    greedylr_jax.chain(optax.clip(1.0), MUST_NOT_BE_SCALED[name]).init(params_for(name))  # without a rule


@pytest.mark.parametrize("name", WRAPPED)
def test_control_inside_wrappers_is_seen_with_bfloat16_parameters(name):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    assert_controls_learning_rate(WRAPPED[name](optax.chain(optax.sgd(1.0), greedy_lr())), params)


@pytest.mark.parametrize("name", thinned(IN_CONTROL, 2))
def test_a_rule_in_control_passes(name):
    assert assert_controls_learning_rate(IN_CONTROL[name], PARAMS) is None


@pytest.mark.parametrize("name", thinned(NOT_IN_CONTROL, 2))
def test_a_rule_that_is_not_in_control_is_an_error_with_the_right_order(name):
    with pytest.raises(AssertionError, match=r"opt_state.*Put it after the optimizer.*greedylr_jax.chain"):
        assert_controls_learning_rate(NOT_IN_CONTROL[name], PARAMS)


def test_control_is_seen_with_python_numbers_as_parameters():
    assert_controls_learning_rate(optax.chain(optax.sgd(0.1), greedy_lr()), {"a": 1.0, "b": 2.0})


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
