"""The range test on functions whose largest stable learning rate is known."""

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


def test_learning_rates_are_geometric_or_linear():
    geometric = range_test(
        loss_fn, START, BATCHES, min_learning_rate=1e-3, max_learning_rate=10.0
    ).learning_rates
    np.testing.assert_allclose(geometric, np.geomspace(1e-3, 10.0, 300), rtol=1e-5)
    linear = range_test(
        loss_fn, START, BATCHES, min_learning_rate=1e-3, max_learning_rate=10.0, ramp="linear"
    ).learning_rates
    np.testing.assert_allclose(linear, np.linspace(1e-3, 10.0, 300), rtol=1e-5)


def test_losses_are_those_after_the_step_on_the_next_batch():
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
def test_suggestions_are_below_divergence_and_follow_the_curvature(ramp, scale):
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


def test_the_losses_are_those_of_the_given_optimizer():
    bounds = {"min_learning_rate": 0.5, "max_learning_rate": 1.0}
    adam, momentum = (
        range_test(loss_fn, START, BATCHES[:20], inner=inner, **bounds).losses
        for inner in (optax.adam(1.0), optax.sgd(1.0, momentum=0.9))
    )
    grads = START - BATCHES[0]
    np.testing.assert_allclose(adam[0], loss_fn(START - 0.5 * jnp.sign(grads), BATCHES[1]), rtol=1e-5)
    first = START - 0.5 * grads
    np.testing.assert_allclose(momentum[0], loss_fn(first, BATCHES[1]), rtol=1e-5)
    rate = np.geomspace(0.5, 1.0, 20)[1]
    second = first - rate * (0.9 * grads + first - BATCHES[1])
    np.testing.assert_allclose(momentum[1], loss_fn(second, BATCHES[2]), rtol=1e-5)


def test_a_metric_in_place_of_the_loss():
    result = range_test(
        loss_fn,
        START,
        BATCHES,
        metric_fn=lambda params, batch: jnp.mean(jnp.abs(params)),
        max_learning_rate=1.0,
    )
    np.testing.assert_allclose(result.losses[0], 10.0, rtol=1e-4)
    assert result.losses[-1] < 2


def test_without_finite_losses_there_is_no_suggestion():
    never = range_test(lambda params, batch: jnp.nan * jnp.sum(params), START, BATCHES)
    assert np.isnan(suggest_best(never)) and np.isnan(suggest_steepest(never))
    figure = plot_range_test(never)
    assert len(figure.axes) == 1


def test_the_steepest_point_is_before_the_best_one():
    losses = jnp.array([5.0, 4.0, 3.9, 3.0, 9.0, 1000.0, 3.5])
    result = RangeTestResult(jnp.arange(1.0, 8.0), losses, losses.at[5].set(jnp.inf))
    assert suggest_best(result) == 4.0
    assert suggest_steepest(result) == 1.0


def test_the_figure_shows_the_curve_and_the_suggestions(tmp_path):
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
    # Also if the differences of learning rates are close to their rounding errors.
    rates = jnp.linspace(1e-3, 1.0, 10_000)
    assert plot_range_test(RangeTestResult(rates, rates, rates)).axes[0].get_xscale() == "linear"
    figure.savefig(tmp_path / "range.png")


@pytest.mark.parametrize("step", [0, 3, 40, 100, 150])
@pytest.mark.parametrize("kind", ["NaN batch", "NaN loss", "outlier"])
def test_one_bad_step_does_not_count_as_divergence(kind, step):
    def bad_loss(params, batch):
        x, is_bad = batch
        if kind == "NaN batch":
            return loss_fn(params, jnp.where(is_bad, jnp.nan, x))
        return jnp.where(is_bad, {"NaN loss": jnp.nan, "outlier": 1e9}[kind], loss_fn(params, x))

    batches = BATCHES[:200]
    result = range_test(bad_loss, START, (batches, jnp.arange(200) == step))
    expected = range_test(loss_fn, START, batches)
    assert np.isfinite(result.losses).sum() >= np.isfinite(expected.losses).sum() - 2
    for suggest in (suggest_best, suggest_steepest):
        np.testing.assert_allclose(suggest(result), suggest(expected), rtol=0.35)


def test_three_bad_steps_in_a_row_are_divergence():
    def bad_loss(params, batch):
        return jnp.where(batch[1], jnp.inf, loss_fn(params, batch[0]))

    steps = jnp.arange(200)
    result = range_test(bad_loss, START, (BATCHES[:200], (steps >= 100) & (steps < 103)))
    np.testing.assert_array_equal(np.isinf(result.smoothed), steps >= 99)  # the loss is of the next batch


def test_of_a_metric_at_its_optimum_the_highest_learning_rate_is_best():
    losses = jnp.concatenate([jnp.linspace(1.0, 0.0, 60), jnp.zeros(100), jnp.linspace(0.0, 1.0, 40)])
    rates = jnp.geomspace(1e-5, 10.0, 200)
    assert suggest_best(RangeTestResult(rates, losses, losses)) == rates[160]
    assert rates[15] < suggest_steepest(RangeTestResult(rates, losses, losses)) < rates[60]
    result = range_test(
        loss_fn,
        START,
        BATCHES,
        metric_fn=lambda params, batch: jnp.maximum(jnp.mean(jnp.abs(params)) - 2, 0),
    )
    assert (result.smoothed == 0).sum() > 50
    assert 0.1 < suggest_best(result) < 2.0


def test_a_constant_metric_has_no_best_learning_rate():
    result = range_test(loss_fn, START, BATCHES, metric_fn=lambda params, batch: 0.5, max_learning_rate=1.0)
    assert np.isnan(suggest_best(result)) and np.isnan(suggest_steepest(result))


def test_the_steepest_slope_is_not_noise_of_the_batches():
    """Regression with 8 examples per batch, whose losses vary by a factor of three."""
    weights = jax.random.normal(jax.random.key(9), (20,))

    def noisy_loss(params, key):
        x_key, y_key = jax.random.split(key)
        x = jax.random.normal(x_key, (8, 20))
        return jnp.mean((x @ (params - weights) - 2 * jax.random.normal(y_key, (8,))) ** 2)

    run = jax.jit(jax.vmap(lambda keys: range_test(noisy_loss, jnp.zeros(20), keys)))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 200))(jnp.arange(20))
    suggestions = jax.vmap(suggest_steepest)(run(keys))
    assert (suggestions > 1e-3).all() and (suggestions < 0.1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_learning_rate": 0.0}, r"min_learning_rate must be a number in \(0, inf\), got 0"),
        (
            {"min_learning_rate": 2.0, "max_learning_rate": 1.0},
            "must be less than max_learning_rate, got .*2.0",
        ),
        ({"min_learning_rate": 1.0, "max_learning_rate": 1.0}, "must be less than max_learning_rate"),
        ({"ramp": "cubic"}, "ramp must be one of 'geometric', 'linear', got 'cubic'"),
        ({"divergence": 1.0}, "divergence must be a number in .1, inf.*got 1"),
        ({"batches": jnp.ones((7, 5))}, "batches must hold arrays .* length >= 8"),
        ({"batches": {"x": jnp.ones((9, 5)), "y": jnp.ones(10)}}, "batches must hold arrays"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        range_test(loss_fn, START, **({"batches": BATCHES} | arguments))
