"""Every rule inside every Optax wrapper, in both adapters: it sees the losses that it should."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from tests.greedylr_jax.rules import BASE_RATE, SCALE_RULES, losses, scales

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4), "b": jnp.ones(2)}
LABELS = {"w": "weights", "b": "bias"}
VALUES = losses(48)


def all_losses(values):
    return values


class Wrapper(NamedTuple):
    """A wrapper around an optimizer with a rule in it, and which losses the rule must see."""

    wrap: Callable
    seen: Callable = all_losses
    group: str | None = None


def with_frozen_bias(tx):
    return optax.partition({"weights": tx, "bias": optax.set_to_zero()}, LABELS)


# What comes later joins by one line.
WRAPPERS = {
    "chain": Wrapper(lambda tx: optax.chain(tx, optax.identity())),
    "named_chain": Wrapper(lambda tx: optax.named_chain(("optimizer", tx))),
    "clipping before it": Wrapper(lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)),
    "masked": Wrapper(lambda tx: optax.masked(tx, {"w": True, "b": False})),
    "partition": Wrapper(with_frozen_bias, group="weights"),
    "apply_if_finite": Wrapper(lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3)),
    "MultiSteps": Wrapper(lambda tx: optax.MultiSteps(tx, 3), lambda values: values[2::3]),
    "multi_steps": Wrapper(
        lambda tx: greedylr_jax.multi_steps(tx, 3), lambda values: values.reshape(-1, 3).mean(axis=1)
    ),
    "schedule_free": Wrapper(lambda tx: optax.contrib.schedule_free(tx, BASE_RATE, b1=0.9)),
    "lookahead-like nesting": Wrapper(lambda tx: optax.chain(optax.chain(optax.chain(tx)))),
    "conditionally_transform": Wrapper(
        lambda tx: optax.conditionally_transform(
            tx, lambda step, **extra: step % 2 == 0, forward_extra_args=True
        ),
        lambda values: values[::2],
    ),
}


def optimizer(case, adapter):
    if adapter == "schedule":
        return optax.inject_hyperparams(optax.sgd)(learning_rate=case.schedule())
    return optax.chain(optax.sgd(BASE_RATE), case.transformation())


def marks(number, place, adapter):
    """By default the first rule goes through every wrapper, and others through a third."""
    # What differs from rule to rule is little here, and ARC's network takes seconds to compile.
    is_default = adapter == "transformation" and SCALE_RULES[number].name not in ("arc", "trend")
    return (
        []
        if (number == 0 and adapter == "transformation") or (is_default and (place - number) % 3 == 0)
        else pytest.mark.slow
    )


COMBINATIONS = [
    pytest.param(case, name, adapter, id=f"{case.name}-{name}-{adapter}", marks=marks(number, place, adapter))
    for number, case in enumerate(SCALE_RULES)
    for place, name in enumerate(WRAPPERS)
    for adapter in ("transformation", "schedule")
]


@pytest.mark.parametrize(("case", "name", "adapter"), COMBINATIONS)
def test_the_rule_sees_its_losses_in_every_wrapper(case, name, adapter):
    wrapper = WRAPPERS[name]
    tx = wrapper.wrap(optimizer(case, adapter))

    def body(carry, value):
        params, state = carry
        grads = jax.tree.map(lambda leaf: leaf / 4, params)
        updates, state = tx.update(grads, state, params, value=value)
        scale = greedylr_jax.get_scale(state, group=wrapper.group)
        return (optax.apply_updates(params, updates), state), scale

    (params, _), got = jax.jit(lambda values: jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), values))(VALUES)
    seen = wrapper.seen(np.arange(len(VALUES), dtype=np.float32))
    expected = scales(case.transformation(), wrapper.seen(VALUES))
    assert np.ptp(expected) > 0
    # Between two observations the scale stays: compare it after each of them.
    at = np.ceil(seen).astype(int) if name != "multi_steps" else seen.astype(int) + 1
    np.testing.assert_array_equal(got[at], expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert not np.array_equal(params["w"], PARAMS["w"])


@pytest.mark.parametrize("case", SCALE_RULES, ids=lambda case: case.name)
def test_a_rule_multiplies_a_warmup_schedule(case):
    warmup = optax.warmup_cosine_decay_schedule(0.0, BASE_RATE, 10, len(VALUES))
    tx = optax.chain(optax.sgd(warmup), case.transformation())

    def body(state, inputs):
        updates, state = tx.update(jnp.ones(()), state, value=inputs)
        return state, updates

    _, got = jax.lax.scan(body, tx.init(jnp.ones(())), VALUES)
    expected = -jax.vmap(warmup)(jnp.arange(len(VALUES))) * scales(case.transformation(), VALUES)
    np.testing.assert_allclose(got, expected, rtol=1e-4)  # 1 + cos(x) cancels near its end


def test_each_group_of_a_partition_has_its_own_rule():
    slow, fast = greedylr_jax.greedy_lr(0.5, 3, window=None), greedylr_jax.greedy_lr(0.5, 0, window=None)
    groups = {"weights": optax.chain(optax.sgd(1.0), slow), "bias": optax.chain(optax.sgd(1.0), fast)}
    tx = optax.partition(groups, LABELS)
    state = tx.init(PARAMS)
    for value in VALUES:
        updates, state = tx.update(PARAMS, state, PARAMS, value=value)
    expected = {"weights": scales(slow, VALUES)[-1], "bias": scales(fast, VALUES)[-1]}
    assert expected["weights"] != expected["bias"]
    for group, parameter in (("weights", "w"), ("bias", "b")):
        assert greedylr_jax.get_scale(state, group=group) == expected[group]
        assert greedylr_jax.metrics(state)[f"{group}/scale"] == expected[group]
        np.testing.assert_array_equal(updates[parameter], -PARAMS[parameter] * expected[group])


def test_a_step_that_apply_if_finite_drops_is_not_observed():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), greedylr_jax.greedy_lr(patience=0)), 3)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
    _, state = tx.update(bad, state, PARAMS, value=jnp.nan)
    assert greedylr_jax.get_scale(state) == 1


def test_multi_steps_averages_only_the_losses_there_are():
    tx = greedylr_jax.multi_steps(greedylr_jax.greedy_lr(patience=0, window=None), 3)
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS, value=4.0)
    _, state = tx.update(PARAMS, state, PARAMS, value=jnp.nan, has_value=jnp.array(False))
    _, state = tx.update(PARAMS, state, PARAMS, value=2.0)
    assert greedylr_jax.metrics(state)["best_value"] == 3.0
    before = greedylr_jax.metrics(state)
    for _ in range(3):  # an optimizer step without a loss
        _, state = tx.update(PARAMS, state, PARAMS, has_value=False)
    assert greedylr_jax.metrics(state) == before
    with pytest.raises(TypeError, match="multi_steps needs the loss"):
        tx.update(PARAMS, state, PARAMS)


def test_multi_steps_follows_a_schedule_of_accumulation():
    tx = greedylr_jax.multi_steps(
        optax.chain(optax.sgd(1.0), greedylr_jax.greedy_lr()), lambda step: 1 + step
    )
    state = tx.init(PARAMS)
    moved = []
    for value in range(6):
        updates, state = tx.update(PARAMS, state, PARAMS, value=float(value))
        moved.append(bool(np.any(updates["w"] != 0)))
    assert moved == [True, False, True, False, False, True]
    assert greedylr_jax.metrics(state)["best_value"] == 0.0
    assert state.value_count == 0


def test_armijo_line_search_stands_beside_a_rule():
    """Optax's own backtracking search, the stochastic line search of the papers, needs no adapter."""

    def loss_fn(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10), greedylr_jax.greedy_lr())
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss_fn)
        params = optax.apply_updates(params, updates)
    assert loss_fn(params) < 0.01 * loss_fn(PARAMS)
