"""A restored state obeys the bounds of the rule that it is restored into."""

import jax.numpy as jnp
import numpy as np
import pytest

from greedylr_jax import greedy_lr, greedy_lr_schedule, trend_lr, trend_lr_schedule

RESUMABLE = {
    "greedy-reference": (greedy_lr, greedy_lr_schedule, dict(cooldown=3, patience=1, reset_at_min=2)),
    "greedy-eps": (greedy_lr, greedy_lr_schedule, dict(eps=1e-3, patience=1)),
    "greedy-paper": (greedy_lr, greedy_lr_schedule, dict(algorithm="paper", reset_after=5)),
    "trend": (trend_lr, trend_lr_schedule, {}),
}


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
