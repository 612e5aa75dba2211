"""Reading the scale and the learning rate out of optimizer states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from greedylr_jax import (
    get_learning_rate,
    get_scale,
    greedy_lr,
    greedy_lr_schedule,
    lr_tuner,
    metrics,
    with_rollback,
)

PARAMS = {"encoder": jnp.ones(2), "decoder": jnp.ones(3)}
# With patience 0 the first loss already raises the rate: scale 2 for the rule, 4 for the schedule.
RULE = greedy_lr(factor=0.5, patience=0)
SCHEDULE = greedy_lr_schedule(0.25, min_learning_rate=0.025, max_learning_rate=2.5, factor=0.25, patience=0)


def state_after_one_step(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)[1]


NESTINGS = {
    "bare": RULE,
    "chain": optax.chain(optax.adamw(0.5), RULE),
    "deep": optax.chain(optax.chain(optax.clip(1.0), optax.chain(optax.adamw(0.5), RULE))),
    "named": optax.named_chain(("optimizer", optax.sgd(0.5)), ("rate", RULE)),
    "injected": optax.inject_hyperparams(lambda learning_rate: optax.chain(optax.sgd(learning_rate), RULE))(
        0.5
    ),
    "finite": optax.apply_if_finite(optax.chain(optax.adamw(0.5), RULE), 3),
    "accumulated": optax.MultiSteps(optax.chain(optax.adamw(0.5), RULE), 1),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_the_scale_is_found_in_any_nesting(name):
    state = state_after_one_step(NESTINGS[name])
    assert get_scale(state) == 2.0
    assert get_learning_rate(state, base_learning_rate=0.5) == 1.0
    assert jax.jit(get_scale)(state) == 2.0


def test_the_rate_of_a_schedule_is_in_its_state():
    state = state_after_one_step(optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE))
    assert get_learning_rate(state) == state.hyperparams["learning_rate"] == 1.0
    assert get_scale(state) == 4.0


def test_an_injected_rate_is_the_base_rate():
    tx = optax.chain(optax.inject_hyperparams(optax.adamw)(learning_rate=0.125), RULE)
    state = state_after_one_step(tx)
    assert get_learning_rate(state) == 0.25
    assert get_learning_rate(state, 1.0) == 2.0


def test_a_missing_or_callable_base_rate_is_explained():
    state = state_after_one_step(NESTINGS["chain"])
    with pytest.raises(ValueError, match="base_learning_rate is needed"):
        get_learning_rate(state)
    with pytest.raises(ValueError, match=r"schedule\(step\)"):
        get_learning_rate(state, optax.constant_schedule(0.1))


def test_no_rule_is_explained():
    state = optax.adamw(1e-3).init(PARAMS)
    for read in (get_scale, metrics, get_learning_rate):
        with pytest.raises(ValueError, match="holds no learning-rate rule"):
            read(state)


@pytest.fixture
def partitioned():
    tx = optax.partition(
        {"slow": optax.chain(optax.sgd(1.0), RULE), "fast": optax.inject_hyperparams(optax.sgd)(SCHEDULE)},
        {"encoder": "slow", "decoder": "fast"},
    )
    return state_after_one_step(tx)


def test_groups_are_read_by_name(partitioned):
    assert get_scale(partitioned, group="slow") == 2.0
    assert get_scale(partitioned, group="fast") == 4.0
    assert get_learning_rate(partitioned, group="fast") == 1.0


@pytest.mark.parametrize("group", [None, "encoder"])
def test_an_ambiguous_or_unknown_group_lists_the_groups(partitioned, group):
    with pytest.raises(ValueError, match=r"('(slow|fast)' at opt_state.*){2}"):
        get_scale(partitioned, group=group)


def test_metrics_are_flat_scalars(partitioned):
    single = metrics(state_after_one_step(NESTINGS["deep"]), prefix="lr/")
    assert single["lr/scale"] == 2.0
    assert single["lr/best_value"] == 1.0
    assert {"lr/num_good", "lr/num_bad", "lr/cooldown_count"} <= single.keys()
    grouped = metrics(partitioned)
    assert grouped["slow/scale"] == 2.0
    assert grouped["fast/learning_rate"] == 1.0
    for value in (single | grouped).values():
        assert value.shape == ()


def test_metrics_number_two_rules_of_one_chain():
    read = metrics(state_after_one_step(optax.chain(optax.sgd(1.0), RULE, greedy_lr())))
    assert read["scale"] == 2.0
    assert read["1/scale"] == 1.0


def _counting(inner):
    return with_rollback(inner, window=2)


COUNTING = {
    "with_rollback without a rule": (_counting(optax.adam(0.1)), {"": (0, 1)}),
    "with_rollback and a rule": (_counting(optax.chain(optax.sgd(0.1), RULE)), {"": (0, 1)}),
    "inside a chain": (optax.chain(optax.clip(1.0), _counting(optax.sgd(0.1))), {"": (0, 1)}),
    "nested": (_counting(_counting(optax.sgd(0.1))), {"": (0, 0), "1/": (0, 1)}),
    "lr_tuner": (lr_tuner(optax.sgd(1.0), 0.1, explore_steps=4, recompute_every=2), {"": (0, 1)}),
    "in a dictionary": (
        optax.named_chain(("guard", _counting(optax.sgd(0.1)))),
        {"guard/": (0, 1)},
    ),
}


@pytest.mark.parametrize("name", COUNTING)
def test_metrics_count_restored_and_skipped_steps(name):
    tx, expected = COUNTING[name]
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
    _, state = tx.update(bad, tx.init(PARAMS), PARAMS, value=1.0, value_fn=lambda params: 1.0)
    logged = metrics(state)
    counts = {key: value for key, value in logged.items() if key.endswith(("rollbacks", "skipped"))}
    assert len(counts) == 2 * len(expected)
    for prefix, (rollbacks, skipped) in expected.items():
        assert counts[prefix + "num_rollbacks"] == rollbacks
        assert counts[prefix + "num_skipped"] == skipped


def test_metrics_leave_out_fields_of_other_packages():
    class State(NamedTuple):
        num_skipped: jax.Array

    assert "num_skipped" not in metrics((State(jnp.zeros(())), RULE.init(PARAMS)))


def test_metrics_work_under_jit():
    tx = NESTINGS["chain"]

    @jax.jit
    def step(state):
        _, state = tx.update(PARAMS, state, PARAMS, value=1.0)
        return metrics(state)

    assert step(tx.init(PARAMS))["scale"] == 2.0
