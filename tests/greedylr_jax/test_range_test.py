"""The range test on functions whose highest useful rate is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedylr_jax.plotting import plot_range_test
from greedylr_jax.range_test import RangeTestResult, range_test, suggest_best, suggest_steepest

BATCHES = jax.random.normal(jax.random.key(0), (300, 5))
START = 10 * jnp.ones(5)


def loss_fn(params, batch):
    return jnp.mean((params - batch) ** 2) * 5 / 2  # curvature 1: gradient descent diverges from 2 on


def test_the_ramps_are_geometric_and_linear():
    geometric = range_test(
        loss_fn, START, BATCHES, min_learning_rate=1e-3, max_learning_rate=10.0
    ).learning_rates
    np.testing.assert_allclose(geometric, np.geomspace(1e-3, 10.0, 300), rtol=1e-5)
    linear = range_test(
        loss_fn, START, BATCHES, min_learning_rate=1e-3, max_learning_rate=10.0, ramp="linear"
    ).learning_rates
    np.testing.assert_allclose(linear, np.linspace(1e-3, 10.0, 300), rtol=1e-5)


def test_the_loss_is_that_after_the_step_on_the_next_batch():
    result = range_test(
        loss_fn, START, BATCHES[:10], min_learning_rate=0.1, max_learning_rate=0.5, ramp="linear"
    )
    params = np.asarray(START, float)
    for index, rate in enumerate(np.linspace(0.1, 0.5, 10)):
        params = params - rate * (params - np.asarray(BATCHES[index]))
        expected = loss_fn(params, BATCHES[(index + 1) % 10])
        np.testing.assert_allclose(result.losses[index], expected, rtol=1e-5)


@pytest.mark.parametrize("ramp", ["geometric", "linear"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_suggestions_lie_below_divergence_and_follow_the_curvature(ramp, scale):
    result = jax.jit(
        lambda: range_test(
            lambda params, batch: scale * loss_fn(params, batch),
            START,
            BATCHES,
            min_learning_rate=1e-4 / scale,
            max_learning_rate=10.0 / scale,
            ramp=ramp,
        )
    )()
    best, steepest = suggest_best(result), suggest_steepest(result)
    assert 0.005 < steepest * scale <= best * scale < 2.0
    assert np.isinf(result.smoothed[-1])


@pytest.mark.parametrize(
    ("inner", "low", "high"), [(optax.adam(1.0), 0.05, 10.0), (optax.sgd(1.0, momentum=0.9), 0.005, 0.5)]
)
def test_other_optimizers(inner, low, high):
    result = range_test(loss_fn, START, BATCHES, inner=inner, min_learning_rate=1e-4, max_learning_rate=100.0)
    assert low < suggest_best(result) < high


def test_another_metric_than_the_loss():
    result = range_test(
        loss_fn,
        START,
        BATCHES,
        metric_fn=lambda params, batch: jnp.mean(jnp.abs(params)),
        max_learning_rate=1.0,
    )
    np.testing.assert_allclose(result.losses[0], 10.0, rtol=1e-4)
    assert result.losses[-1] < 2


def test_a_loss_that_never_falls_suggests_nothing():
    never = range_test(lambda params, batch: jnp.nan * jnp.sum(params), START, BATCHES)
    assert np.isnan(suggest_best(never)) and np.isnan(suggest_steepest(never))
    figure = plot_range_test(never)
    assert len(figure.axes) == 1


def test_the_steepest_point_is_before_the_best_one():
    losses = jnp.array([5.0, 4.0, 3.9, 3.0, 9.0, 1000.0, 3.5])
    result = RangeTestResult(jnp.arange(1.0, 8.0), losses, losses.at[5].set(jnp.inf))
    assert suggest_best(result) == 4.0
    assert suggest_steepest(result) == 1.0


def test_the_picture_shows_curve_and_suggestions(tmp_path):
    result = range_test(loss_fn, START, BATCHES, max_learning_rate=10.0)
    figure = plot_range_test(result, title="a quadratic")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("learning rate", "loss", "log")
    assert axes.get_title() == "a quadratic"
    markers = [line for line in axes.lines if line.get_marker() in "vD"]
    drawn = [float(line.get_xdata()[0]) for line in markers]
    np.testing.assert_allclose(drawn, [suggest_best(result), suggest_steepest(result)])
    linear = plot_range_test(range_test(loss_fn, START, BATCHES, max_learning_rate=1.0, ramp="linear"))
    assert linear.axes[0].get_xscale() == "linear"
    # Also where a rate's rounding is a good part of the step to the next.
    rates = jnp.linspace(1e-3, 1.0, 10_000)
    assert plot_range_test(RangeTestResult(rates, rates, rates)).axes[0].get_xscale() == "linear"
    figure.savefig(tmp_path / "range.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_learning_rate": 0.0}, r"min_learning_rate must be a number in \(0, inf\), got 0"),
        (
            {"min_learning_rate": 2.0, "max_learning_rate": 1.0},
            "min_learning_rate must not exceed max_learning_rate",
        ),
        ({"ramp": "cubic"}, "ramp must be one of 'geometric', 'linear', got 'cubic'"),
        ({"divergence": 1.0}, "divergence must be a number in .1, inf.*got 1"),
        ({"batches": jnp.ones((7, 5))}, "batches must hold arrays .* length >= 8"),
        ({"batches": {"x": jnp.ones((9, 5)), "y": jnp.ones(10)}}, "batches must hold arrays"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        range_test(loss_fn, START, **({"batches": BATCHES} | arguments))
