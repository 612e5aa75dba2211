"""GreedyLR that only lowers the rate, compared with ``optax.contrib.reduce_on_plateau``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedylr_jax import greedy_lr, greedy_lr_schedule, metrics
from tests.greedylr_jax.rules import BASE_RATE, losses, scales

NOISY = np.random.default_rng(3).normal(size=200).cumsum().astype(np.float32) / 8 + 20


def plateau_scales(values, **settings):
    """The scales of Optax's own rule."""
    tx = optax.contrib.reduce_on_plateau(**settings)

    def body(state, value):
        _, state = tx.update(jnp.ones(()), state, value=value)
        return state, state.scale

    return np.asarray(jax.lax.scan(body, tx.init(jnp.ones(())), values)[1])


@pytest.mark.parametrize(
    "threshold", [{"atol": 1e-6, "rtol": 0.0}, {"atol": 0.25, "rtol": 0.0}, {"rtol": 1e-2}]
)
@pytest.mark.parametrize(("patience", "accumulation_size"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("min_scale", [1e-6, 0.1])
def test_scales_equal_those_of_optax(threshold, patience, accumulation_size, min_scale):
    """Optax (and Keras) decrease at bad observation number ``patience``, GreedyLR at the one after it."""
    expected = plateau_scales(
        NOISY,
        factor=0.5,
        patience=patience,
        accumulation_size=accumulation_size,
        min_scale=min_scale,
        **threshold,
    )
    assert len(np.unique(expected)) > 2
    relative = threshold["rtol"] > 0
    rule = greedy_lr(
        0.5,
        patience - 1,
        threshold=threshold["rtol"] if relative else threshold["atol"],
        threshold_mode="rel" if relative else "abs",
        window=None,
        min_scale=min_scale,
        every=accumulation_size,
        only_decrease=True,
    )
    np.testing.assert_array_equal(scales(rule, NOISY), expected)


def test_a_loss_that_is_not_finite_is_bad_as_in_optax():
    values = np.array([3.0, 2.0, np.nan, np.inf, 1.0, np.nan, np.nan], np.float32)
    expected = plateau_scales(values, factor=0.5, patience=2, rtol=0.0, atol=1e-6)
    np.testing.assert_array_equal(expected, [1, 1, 1, 0.5, 0.5, 0.5, 0.25])
    rule = greedy_lr(0.5, 1, window=None, only_decrease=True, min_scale=0.0)
    np.testing.assert_array_equal(scales(rule, values), expected)


def test_patience_is_counted_as_in_pytorch():
    """``torch.optim.lr_scheduler.ReduceLROnPlateau(patience=2)`` decreases after more than two bad epochs."""
    rule = greedy_lr(0.5, 2, window=None, only_decrease=True)
    np.testing.assert_array_equal(scales(rule, np.ones(8)), [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("algorithm", ["reference", "paper"])
def test_a_decrease_is_never_undone(algorithm):
    settings = dict(factor=0.5, patience=1, window=4, algorithm=algorithm)
    values = losses(120)
    assert np.any(np.diff(scales(greedy_lr(max_scale=1.0, **settings), values)) > 0)
    got = scales(greedy_lr(only_decrease=True, **settings), values)
    assert got[-1] < 1 and np.all(np.diff(got) <= 0)


def test_the_schedule_only_decreases_too():
    schedule = greedy_lr_schedule(
        BASE_RATE,
        min_learning_rate=BASE_RATE / 4,
        max_learning_rate=BASE_RATE,
        factor=0.5,
        patience=0,
        window=None,
        only_decrease=True,
    )
    state, rates = schedule.init(), []
    for value in (3.0, 2.0, 2.5, 1.0, 1.0):
        state = schedule.update(state, value=value)
        rates.append(float(schedule(state)) / BASE_RATE)
    assert rates == [1, 1, 0.5, 0.5, 0.25]


def test_improvements_are_still_counted():
    rule = greedy_lr(patience=1, window=None, only_decrease=True)
    state = rule.init(None)
    for value in (5.0, 4.0, 3.0, 2.0):
        _, state = rule.update(None, state, value=value)
    assert metrics(state)["num_good"] == 4 and metrics(state)["scale"] == 1
