"""What holds for all constructors of GreedyLR, the trend rule and the passive schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import greedylr_jax
from greedylr_jax import greedy_lr, greedy_lr_schedule, trend_lr, trend_lr_schedule
from greedylr_jax.schedules import epoch_step_schedule, knee_schedule

RESUMABLE = {
    "greedy-reference": (greedy_lr, greedy_lr_schedule, dict(cooldown=3, patience=0, reset_at_min=2)),
    "greedy-eps": (greedy_lr, greedy_lr_schedule, dict(eps=1e-3, patience=0)),
    "greedy-paper": (greedy_lr, greedy_lr_schedule, dict(algorithm="paper", reset_after=5)),
    "trend": (trend_lr, trend_lr_schedule, {}),
}
PASSIVE = {
    "knee": lambda: knee_schedule(0.4, 60, 100, warmup_steps=20, end_value=0.1),
    "epoch_step": lambda: epoch_step_schedule(0.5, [2, 5], 20),
}
CONSTRUCTORS = PASSIVE | {
    f"{name}-{adapter}": make
    for name, (transformation, schedule, settings) in RESUMABLE.items()
    for adapter, make in {
        "transformation": lambda f=transformation, s=settings: f(**s),
        "schedule": lambda f=schedule, s=settings: f(0.1, min_learning_rate=0.01, max_learning_rate=1.0, **s),
    }.items()
}


def use(made):
    """A rate or a scale that follows from what a constructor returned."""
    if isinstance(made, greedylr_jax.GradientTransformationExtraLoss):
        return greedylr_jax.get_scale(made.update(jnp.ones(2), made.init(jnp.ones(2)), value=1.0)[1])
    if isinstance(made, greedylr_jax.RuleSchedule):
        return made(made.init(), value=1.0)
    return made(50)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_no_arrays_and_leaks_no_tracer(name):
    made = []

    def construct(x):
        made.append(CONSTRUCTORS[name]())
        return x

    with jax.checking_leaks():
        program = jax.make_jaxpr(construct)(1.0)
    assert not program.eqns
    np.testing.assert_array_equal(use(made[0]), use(CONSTRUCTORS[name]()))


@pytest.mark.parametrize(("old", "expected"), [(8.0, 2.0), (0.01, 0.5), (1.5, None)])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_restored_scale_obeys_new_bounds_from_the_next_observation_on(name, old, expected):
    transformation, schedule, settings = RESUMABLE[name]

    def check(init, update, scale, factor):
        rule = init.rule._replace(scale=jnp.float32(old * factor))
        restored = init._replace(rule=rule)
        first = scale(update(restored, 1.0))
        for value in (jnp.nan, 2.0, 3.0):  # decreases, cooldowns, resets
            restored = update(restored, value)
            assert 0.5 * factor <= scale(restored) <= 2.0 * factor
        if expected is not None:
            np.testing.assert_allclose(first, expected * factor, rtol=1e-6)

    tx = transformation(min_scale=0.5, max_scale=2.0, **settings)
    check(
        tx.init(None),
        lambda state, value: tx.update(None, state, value=value)[1],
        lambda state: state.rule.scale,
        1.0,
    )
    rates = schedule(0.1, min_learning_rate=0.05, max_learning_rate=0.2, **settings)
    start = rates.init()
    check(
        start.rule_state,
        lambda state, value: rates.update(start._replace(rule_state=state), value=value).rule_state,
        lambda state: state.rule.scale,
        0.1,
    )


def test_a_restored_scale_in_the_new_bounds_is_kept():
    tx = greedy_lr(min_scale=0.5, max_scale=2.0)
    state = tx.init(None)
    state = state._replace(rule=state.rule._replace(scale=jnp.float32(1.25)))
    assert tx.update(None, state, value=1.0)[1].rule.scale == 1.25
