"""The contents of the figure of a training run."""

import io

import jax
import matplotlib.image
import numpy as np
import pytest

import greedylr_jax
from greedylr_jax.plotting import plot_history
from tests.greedylr_jax.rules import losses


def recorded(tx, values):
    """The metrics of a run, stacked over the steps."""

    def body(state, value):
        _, state = tx.update(None, state, value=value)
        return state, greedylr_jax.metrics(state)

    return jax.lax.scan(body, tx.init(None), values)[1]


def labels(figure):
    return [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]


@pytest.mark.parametrize("resets", [{"reset_at_min": 1}, {"reset_after": 20}])
def test_increases_decreases_and_resets_are_counted(resets):
    values = losses(200)
    history = recorded(greedylr_jax.greedy_lr(0.5, 1, window=None, **resets), values)
    scale, best = np.asarray(history["scale"]), np.asarray(history["best_value"])
    seen = np.asarray(history["num_observations"])
    reset = (np.isinf(best[1:]) & ~np.isinf(best[:-1])) | (np.diff(seen) < 0)
    raised, cut = (np.diff(scale) > 0) & ~reset, (np.diff(scale) < 0) & ~reset
    assert reset.sum() and raised.sum() and cut.sum()
    figure = plot_history(values, history, base_learning_rate=1e-3)
    expected = {f"raise ({raised.sum()})", f"cut ({cut.sum()})", f"reset ({reset.sum()})"}
    assert expected == set(labels(figure))
    drawn = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, 1e-3 * scale)


def test_it_draws_something(tmp_path):
    values = np.exp(losses(200))
    history = recorded(greedylr_jax.greedy_lr(0.5, 1), values)
    figure = plot_history(values, history, smooth=10, validation=([50, 100], [1.0, 0.9]), title="a run")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    assert matplotlib.image.imread(buffer).std() > 0.05
    assert {"mean of 10", "validation"} < set(labels(figure))
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]


def test_losses_that_are_not_finite_leave_gaps_and_negative_losses_a_linear_axis():
    figure = plot_history(np.array([1.0, np.nan, -1.0, np.inf]), np.ones(4), smooth=2)
    raw = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(np.isnan(raw), [False, True, False, True])
    assert figure.axes[0].get_yscale() == "linear"
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [1.0, 1.0, -1.0, -1.0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.ones(3), np.ones(4)), {}, r"shapes \(3,\) and \(4,\)"),
        ((np.ones((2, 3)), np.ones((2, 3))), {}, "one value a step"),
        ((np.ones(3), {"lr/scale": np.ones(3)}), {}, "prefix"),
        ((np.ones(3), np.ones(3)), {"smooth": 0}, "smooth must be an integer >= 1, got 0"),
    ],
)
def test_invalid_arguments_raise(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plot_history(*arguments, **options)
