"""Passive schedules, at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedylr_jax.schedules import epoch_step_schedule, knee_schedule

STEPS = np.arange(130)


def test_knee_is_warmup_plateau_and_a_straight_line():
    got = jax.vmap(knee_schedule(0.4, 60, 100, warmup_steps=20, end_value=0.1))(jnp.arange(130))
    expected = np.interp(STEPS, [0, 20, 60, 100], [0.0, 0.4, 0.4, 0.1])
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("explore", "at_half"), [(0, 0.2), (100, 0.4), (50, 0.4)])
def test_knee_at_its_limits(explore, at_half):
    schedule = knee_schedule(0.4, explore, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [0.4, at_half, 0.0], atol=1e-6)


def test_step_decay_falls_at_the_first_step_of_its_epochs():
    got = jax.jit(jax.vmap(epoch_step_schedule(0.5, [2, 5], 20, factor=0.1)))(jnp.arange(130))
    expected = np.where(STEPS < 40, 0.5, np.where(STEPS < 100, 0.05, 0.005))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(epoch_step_schedule(0.5, [], 20)(7), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: knee_schedule(0.0, 1, 2), "init_value must be"),
        (lambda: knee_schedule(0.1, 3, 2), r"explore_steps must be an integer in \[0, 2\], got 3"),
        (lambda: knee_schedule(0.1, 1, 0), "total_steps must be"),
        (lambda: knee_schedule(0.1, 1, 2, warmup_steps=2), "warmup_steps must be"),
        (lambda: knee_schedule(0.1, 1, 2, end_value=0.2), "end_value must be"),
        (lambda: epoch_step_schedule(0.1, [2, 1], 10), r"epochs must be increasing, got \[2, 1\]"),
        (lambda: epoch_step_schedule(0.1, [0], 10), "epochs must be an integer"),
        (lambda: epoch_step_schedule(0.1, [1], 0), "steps_per_epoch must be"),
        (lambda: epoch_step_schedule(0.1, [1], 10, factor=0.0), "factor must be"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
