"""Constructors compute with NumPy only: what is built inside a jitted function may be used outside of it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import arc, schedules, theory
from tests.greedylr_jax.rules import SCALE_RULES

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.ones(2)}
LABELS = {"w": "weights", "b": "bias"}
RATES = {"min_learning_rate": 1e-3, "max_learning_rate": 1.0}


def slotted() -> optax.GradientTransformation:
    """``value_from_slot`` for parameters without a slot."""
    tx = greedylr_jax.value_from_slot(greedylr_jax.chain(optax.sgd(0.1), greedylr_jax.greedy_lr()))

    def init(params):
        return tx.init(greedylr_jax.add_loss_slot(params))

    def update(updates, state, params, *, value, **extra_args):
        del extra_args
        loss_slot = jnp.asarray(value, jnp.float32)
        steps, state = tx.update(greedylr_jax.LossSlot(updates, loss_slot), state)
        return steps.params, state

    return optax.GradientTransformationExtraArgs(init, update)


def filled():
    loss_fn = greedylr_jax.fill_loss_slot(lambda params: 2.0 * params)
    return lambda params: loss_fn(greedylr_jax.add_loss_slot(params))


# Every public function that makes a transformation, a schedule or a part of one.
CONSTRUCTORS = {
    "arc.arc": lambda: arc.arc(steps_per_cycle=2),
    "arc.arc_schedule": lambda: arc.arc_schedule(0.1, steps_per_cycle=2),
    "auto_lr": lambda: greedylr_jax.auto_lr(optax.sgd(1.0)),
    "auto_lr, total_steps": lambda: greedylr_jax.auto_lr(optax.sgd(1.0), total_steps=100),
    "chain": lambda: greedylr_jax.chain(greedylr_jax.greedy_lr(), optax.adam(0.1)),
    "factor_polling": lambda: optax.chain(optax.sgd(0.1), greedylr_jax.factor_polling()),
    "greedy_lr": lambda: greedylr_jax.greedy_lr(reset_at_min=3, reset_after=20),
    "greedy_lr, paper": lambda: greedylr_jax.greedy_lr(algorithm="paper", window=None),
    "greedy_lr_schedule": lambda: greedylr_jax.greedy_lr_schedule(0.1, **RATES),
    "hypergradient": lambda: greedylr_jax.hypergradient(optax.sgd(1.0), 0.1, 1e-3),
    "hypergradient, groups": lambda: greedylr_jax.hypergradient(
        optax.sgd(1.0), 0.1, 1e-3, granularity="group", param_labels=LABELS
    ),
    "hypergradient, elements": lambda: greedylr_jax.hypergradient(
        optax.adam(1.0), 0.1, 1e-3, granularity="parameter", mode="multiplicative"
    ),
    "fill_loss_slot": filled,
    "lr_tuner": lambda: greedylr_jax.lr_tuner(optax.sgd(1.0), 0.1, explore_steps=2, recompute_every=2),
    "multi_steps": lambda: greedylr_jax.multi_steps(optax.sgd(0.1), 2),
    "scale_by_rule": lambda: SCALE_RULES[-1].transformation(every=2),
    "scale_to_parameters": lambda: optax.chain(optax.sgd(1.0), greedylr_jax.scale_to_parameters(0.01)),
    "schedule_by_rule": SCALE_RULES[-1].schedule,
    "schedules.epoch_step_schedule": lambda: schedules.epoch_step_schedule(0.1, [1, 2], 10),
    "schedules.knee_schedule": lambda: schedules.knee_schedule(0.1, explore_steps=5, total_steps=10),
    "superbatch_loss": lambda: greedylr_jax.superbatch_loss(lambda params, batch: 0.0, np.ones((2, 3))),
    "theory.local_smoothness": theory.local_smoothness,
    "trend_lr": greedylr_jax.trend_lr,
    "trend_lr_schedule": lambda: greedylr_jax.trend_lr_schedule(0.1, **RATES),
    "value_from": lambda: greedylr_jax.value_from(greedylr_jax.trend_lr(), "loss"),
    "value_from_observe": lambda: greedylr_jax.value_from_observe(greedylr_jax.greedy_lr()),
    "value_from_slot": slotted,
    "with_rollback": lambda: greedylr_jax.with_rollback(optax.adam(0.1)),
}
# Functions that act at once, and so have no constructor to test.
ACT_AT_ONCE = {
    "add_loss_slot",
    "assert_controls_learning_rate",
    "get_learning_rate",
    "get_scale",
    "metrics",
    "observe",
    "set_learning_rate",
    "set_scale",
}


def test_every_public_constructor_is_in_the_table():
    functions = {name for name in greedylr_jax.__all__ if inspect.isfunction(getattr(greedylr_jax, name))}
    assert functions - ACT_AT_ONCE <= CONSTRUCTORS.keys()


def use(made) -> None:
    """Runs a transformation, or a schedule, for a few steps."""
    if isinstance(made, greedylr_jax.RuleSchedule):
        made = optax.inject_hyperparams(optax.sgd)(learning_rate=made)
    if isinstance(made, optax.GradientTransformation):
        value_fn = lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))  # noqa: E731
        tx, params = optax.with_extra_args_support(made), PARAMS
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params, value=value_fn(params), value_fn=value_fn)
            params = optax.apply_updates(params, updates)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    else:  # a plain schedule, or the loss on a superbatch
        assert np.isfinite(made(3))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_no_arrays_of_a_trace(name):
    made = []
    jaxpr = jax.make_jaxpr(lambda: (made.append(CONSTRUCTORS[name]()), ())[1])()
    assert not jaxpr.eqns
    use(made[0])  # a tracer in it would raise an error
