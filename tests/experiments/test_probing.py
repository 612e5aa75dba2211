"""What probing costs and what it does on a real network, and the study of hypergradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from rich.console import Console

from experiments.bench import probing as bench
from experiments.studies import hypergradient as study
from experiments.studies.base import Job
from experiments.tasks import make_task
from experiments.training.engine import batch_indices
from greedylr_jax import factor_polling
from greedylr_jax.plotting import plot_range_test
from greedylr_jax.range_test import range_test, suggest_best, suggest_steepest

# A good constant rate of SGD for each network: of a grid from 0.01 to 3, the best one for the first.
TUNED = {"digits": 0.5, "digits-mlp": 0.3}


@pytest.fixture(
    scope="module", params=["digits-mlp", pytest.param("digits", marks=pytest.mark.slow)], ids=str
)
def task(request):
    return make_task(request.param)


def batches_of(task, steps, seed):
    indices = batch_indices(task, steps, jax.random.key(seed))
    return jax.tree.map(lambda examples: jnp.asarray(examples)[indices], task.train)


def test_work_and_memory_of_probing_stay_in_their_limits():
    """Three passes and not five, six for exact derivatives, one gradient and one copy for all factors."""
    rows = {row.name: row for row in bench.cost_rows(repeats=0)}
    for row in rows.values():
        assert row.limit is None or row.flops <= row.limit * 1.001, row
    assert rows["probe, 3 points"].flops > 2.9  # the passes that XLA counts once are all there
    assert rows["polling, 7 factors"].flops > 9.0
    memory = bench.polling_memory()
    assert memory["polling, 7 factors"] < 3 + memory["batch, forward"]


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.DIRECTIONS)
def test_on_a_network_cheap_probes_propose_the_rate_of_a_five_point_fit(name):
    """To 2% with three points, and to 10% with exact derivatives, which see no kink of a ReLU nearby."""
    each = bench.agreement_of(name, steps=100, every=10)
    assert each.three_points.max() < 0.02
    assert each.taylor.max() < 0.1
    assert np.median(each.taylor) < 0.02


SEEDS = jnp.arange(3)


def accuracies(task, make_tx, steps=300):
    """Test accuracy after a training with each seed, one compilation for all."""

    def train(seed):
        params, tx = task.init(jax.random.key(seed)), optax.with_extra_args_support(make_tx())

        def body(carry, indices):
            params, state = carry
            batch = jax.tree.map(lambda examples: jnp.asarray(examples)[indices], task.train)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(
                grads, state, params, value=loss, value_fn=lambda p: task.loss(p, batch)
            )
            return (optax.apply_updates(params, updates), state), None

        indices = batch_indices(task, steps, jax.random.key(seed))
        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), indices)
        return task.metric(params, task.test)

    return np.asarray(jax.jit(lambda seeds: jax.lax.map(train, seeds))(SEEDS))


def test_polling_recovers_from_a_rate_200_times_too_large(task):
    assert (accuracies(task, lambda: optax.sgd(TUNED[task.name])) > 0.9).all()
    polling = factor_polling(bench.FACTORS)
    assert (accuracies(task, lambda: optax.chain(optax.sgd(200 * TUNED[task.name]), polling)) > 0.9).all()


@pytest.mark.slow
def test_without_its_guard_against_divergence_polling_does_not_recover(task):
    """As the paper reports; so it is the guard that does it, and not the network that forgives."""
    assert (accuracies(task, lambda: optax.sgd(200 * TUNED[task.name])) < 0.2).all()
    for settings in ({"divergence": float("inf")}, {"decline": False}):
        polling = factor_polling(bench.FACTORS, **settings)
        after = accuracies(
            task, lambda polling=polling: optax.chain(optax.sgd(200 * TUNED[task.name]), polling)
        )
        assert (after < 0.9).any()  # with it, all are above


def test_the_range_test_finds_the_best_rate_of_a_grid_within_a_factor_of_three(task, tmp_path):
    grid = jnp.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0])

    def both(seed):
        indices = batch_indices(task, 300, jax.random.key(seed))
        batches = jax.tree.map(lambda examples: jnp.asarray(examples)[indices], task.train)
        params = task.init(jax.random.key(seed))

        def final_loss(rate):
            def body(params, batch):
                loss, grads = jax.value_and_grad(task.loss)(params, batch)
                return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

            return jnp.mean(jax.lax.scan(body, params, batches)[1][-30:])

        first = jax.tree.map(lambda leaf: leaf[:100], batches)
        return jax.lax.map(final_loss, grid), range_test(task.loss, params, first, min_learning_rate=1e-4)

    losses, results = jax.jit(lambda seeds: jax.lax.map(both, seeds))(SEEDS)
    for row in range(len(SEEDS)):
        best = grid[np.nanargmin(losses[row])]
        result = jax.tree.map(lambda leaf, row=row: leaf[row], results)
        assert best / 3 <= suggest_best(result) <= best * 3
        assert suggest_steepest(result) <= suggest_best(result)
    plot_range_test(result, title="digits, SGD").savefig(tmp_path / "range_test.png")
    assert (tmp_path / "range_test.png").stat().st_size > 10_000


def made_up_runs():
    """Rows as the study writes them, of histories that are known."""
    decay, steps = np.exp(-np.linspace(0, 2, 60)), np.ones(60)
    rows = []
    for method in study.METHODS:
        for rate in study.INITIAL_RATES:
            names = {
                "per parameter": ["learning_rate_max", "learning_rate_mean", "learning_rate_min"],
                "per group": ["first/learning_rate", "second/learning_rate"],
            }.get(method, ["learning_rate"])
            for seed in range(3):
                spread = 1 + 0.1 * seed + (method == "GreedyLR")
                history = study.History(spread * decay, dict.fromkeys(names, rate * steps), np.float32(0.5))
                rows.append(study._row(method, (seed, rate, 0.1), history))
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_study_tells_the_difference_from_constant_sgd_by_seed():
    table = study.summarize(made_up_runs()).filter(pl.col("learning_rate") == study.INITIAL_RATES[0])
    end = np.exp(-np.linspace(0, 2, 60))[-3:].mean()
    greedy = table.row(by_predicate=pl.col("method") == "GreedyLR", named=True)
    # The same for all seeds: an interval without width, though the losses of the seeds differ.
    for name in ("difference", "difference_low", "difference_high"):
        np.testing.assert_allclose(greedy[name], end, rtol=1e-5)
    np.testing.assert_allclose(greedy["final_loss"], 2.1 * end, rtol=1e-6)
    same = table.row(by_predicate=pl.col("method") == "per group", named=True)
    assert same["difference"] == 0


@pytest.mark.parametrize("draw", [study.draw_losses, study.draw_greedy, study.draw_groups])
def test_the_figures_of_the_study_name_what_they_draw(draw):
    figure = draw(made_up_runs())
    assert [axes.get_title() for axes in figure.axes] == ["initial rate 0.01", "initial rate 0.1"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len({text.get_text() for text in legend.get_texts()}) >= 2


@pytest.mark.slow
def test_with_hyper_learning_rate_zero_groups_keep_the_constant_rate(task):
    constant, group = (
        study.train(task, method, 20, [(3, 0.05, 0.0)])[0] for method in ("constant SGD", "per group")
    )
    np.testing.assert_allclose(group.loss, constant.loss, rtol=1e-5)
    assert sorted(group.rates) == [f"{layer}/learning_rate" for layer in ("first", "logits", "second")]
    assert all((values == np.float32(0.05)).all() for values in group.rates.values())


@pytest.mark.slow
def test_the_study_leaves_table_figures_and_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(study.PRESETS, "quick", {"steps": 40, "seeds": 2})
    monkeypatch.setattr(study, "HYPER_RATES", (1e-3, 1e-1))
    monkeypatch.setattr(study, "TUNING_SEEDS", (1000,))
    console = Console(record=True, width=80)
    study.run(Job("hypergradient", "quick", tmp_path, console))
    runs = pl.read_parquet(tmp_path / "runs.parquet")
    assert len(runs) == len(study.METHODS) * len(study.INITIAL_RATES) * 2
    assert set(runs["hyper_learning_rate"]) <= {0.0, 1e-3, 1e-1}
    for row in runs.iter_rows(named=True):
        assert len(row["loss"]) == 40 and np.isfinite(row["loss"]).all()
        histories = {name: values for name, values in row["rates"].items() if values is not None}
        expected = {"constant SGD": 1, "GreedyLR": 1, "per parameter": 3, "per group": 3}
        assert len(histories) == expected[row["method"]]
    for name in ("fig8_losses.png", "fig9_greedylr.png", "fig10_rates.png", "table.csv"):
        assert (tmp_path / name).stat().st_size > 0
    assert "per parameter" in console.export_text()
