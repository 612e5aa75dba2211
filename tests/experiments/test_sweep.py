"""Sweeps: optimizers with their own learning rates, resumption, the study of rate sensitivity, reports."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plotly.graph_objects as go
import polars as pl
import pytest
from mnist1d.data import get_dataset_args, make_dataset
from rich.console import Console
from safetensors.numpy import save_file

from experiments.data.loading import load_split
from experiments.data.mnist1d import Mnist1d
from experiments.errors import UsageError
from experiments.reporting import html
from experiments.studies import rate_sensitivity, theory
from experiments.studies.base import Job
from experiments.studies.tuning import best_rates
from experiments.tasks import make_task
from experiments.training import sweep
from experiments.training.engine import Engine, RunSpec, Settings
from experiments.training.loop import batch_indices, take, train, train_step
from experiments.training.schedules import SCHEDULES, RateOptimizer
from experiments.training.store import RunStore
from greedylr_jax import get_scale, superbatch_loss
from greedylr_jax.arc import arc, initial_weights
from greedylr_jax.theory import estimate_smoothness
from tests.experiments.browser import HAS_BROWSER, open_and_click
from tests.experiments.figures import assert_is_drawn, lines_of


@pytest.fixture(scope="module")
def task():
    return make_task("digits-mlp")


@pytest.mark.slow
def test_mnist1d_equals_the_published_set_and_keeps_the_random_state(tmp_path):
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    splits = {split: load_split(Mnist1d, split, tmp_path) for split in ("train", "test")}
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    made = make_dataset(get_dataset_args())
    for split, suffix in (("train", ""), ("test", "_test")):
        expected = made["x" + suffix].astype(np.float32)
        # The builder shuffles: compare as sets of rows with their labels.
        rows = {row.tobytes(): int(label) for row, label in zip(expected, made["y" + suffix], strict=True)}
        built = splits[split]
        assert len(built["label"]) == len(expected)
        assert {r.tobytes(): int(y) for r, y in zip(built["signal"], built["label"], strict=True)} == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name, entry in SCHEDULES.items() if isinstance(entry, RateOptimizer) and entry.reports_rate],
)
def test_an_optimizer_with_its_own_rate_trains_as_in_plain_optax(task, name):
    steps, rate, seed = 40, 0.1, 5
    engine = Engine(task, "sgd", Settings(steps))
    ((_, got, _),) = next(engine.train([RunSpec(name, rate, seed)]))
    assert engine.num_compilations == 1
    entry = SCHEDULES[name]

    def value_fn(step, batches):
        rows = batches[(step + jnp.arange(entry.superbatch)) % steps]
        return {"value_fn": superbatch_loss(task.loss, jax.vmap(lambda row: take(task.train, row))(rows))}

    tx = entry.optimizer(optax.sgd(1.0), rate, steps)
    _, losses, _ = jax.jit(lambda: train(task, tx, steps, seed, extra_args=value_fn))()
    np.testing.assert_allclose(got.loss, losses, rtol=1e-3)
    assert np.ptp(got.rate) > 0


@pytest.mark.slow
def test_validation_losses_of_every_other_held_out_example_reach_arc(task, tmp_path):
    steps, evaluations, seed = 24, 8, 5
    # A network whose decisions depend on the validation losses.
    keys = jax.random.split(jax.random.key(3), 20)
    weights = {
        name: np.asarray(array + 0.3 * jax.random.normal(key, array.shape))
        for (name, array), key in zip(initial_weights(keys[0]).items(), keys[1:], strict=False)
    }
    save_file(weights, tmp_path / "sensitive.safetensors")
    path = str(tmp_path / "sensitive.safetensors")
    spec = RunSpec(f"ARC(weights={path!r}, decisions=6)", 0.1, seed)
    engine = Engine(task, "sgd", Settings(steps, evaluations, validated=True))
    ((_, got, _),) = next(engine.train([spec]))

    tx = optax.chain(optax.sgd(0.1), arc(weights, steps_per_cycle=4))
    held_out = jax.tree.map(jnp.asarray, task.test)
    seen, reported = (jax.tree.map(lambda rows, at=at: rows[at::2], held_out) for at in (0, 1))
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    batches = batch_indices(task, steps, batch_key)

    @jax.jit
    def step(params, state, indices, is_due):
        given = jnp.where(is_due, task.loss(params, seen), jnp.nan)
        batch = take(task.train, indices)
        return train_step(task, tx, params, state, batch, validation_value=given)[:2]

    def rates_and_metrics(is_validated):
        params = task.init(init_key)
        state = tx.init(params)
        rates, metrics = [], []
        for index in range(steps):
            is_last = (index + 1) % 3 == 0
            params, state = step(params, state, batches[index], is_last and is_validated)
            rates.append(0.1 * float(get_scale(state)))
            if is_last:
                metrics.append(float(task.metric(params, reported)))
        return rates, metrics

    rates, metrics = rates_and_metrics(True)
    np.testing.assert_allclose(got.rate, rates, rtol=1e-5)
    np.testing.assert_allclose(got.test_metric, metrics, atol=0.011)  # two of 180
    assert not np.allclose(got.rate, rates_and_metrics(False)[0])


@pytest.mark.slow
def test_validation_losses_of_a_recurrent_network_are_finite():
    # Flax cannot scan over parameters of another level of tracing than that of the module.
    engine = Engine(make_task("language-lstm"), "sgd", Settings(4, 2, validated=True))
    ((_, got, _),) = next(engine.train([RunSpec("ARC(decisions=2)", 1.0, 0)]))
    assert np.isfinite(got.test_loss).all()


SMALL = {
    "tasks": ("digits-mlp",),
    "schedules": ("constant", "cosine", "GreedyLR"),  # one compilation
    "steps": 30,
    "seeds": 2,
}


@pytest.fixture
def small_study(monkeypatch):
    monkeypatch.setitem(rate_sensitivity.PRESETS, "quick", SMALL)
    monkeypatch.setattr(rate_sensitivity, "OPTIMIZERS", ("sgd",))
    engines = {}

    def shared_engine(task, optimizer, settings, accumulation):
        key = task.name, optimizer, settings
        if key not in engines:
            engines[key] = Engine(task, optimizer, settings, accumulation)
        return engines[key]

    monkeypatch.setattr(sweep, "Engine", shared_engine)  # three calls of the study compile one program


def run_interrupted(job, monkeypatch):
    """Runs the study and interrupts it after three groups of runs."""
    whole, calls = Engine.train, []

    def interrupted(self, specs):
        for group in whole(self, specs):
            calls.append(len(group))
            if len(calls) == 3:
                raise KeyboardInterrupt
            yield group

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "train", interrupted)
        rate_sensitivity.run(job)
    assert not (job.out / "runs.parquet").exists()


@pytest.mark.slow
def test_a_resumed_study_ends_as_an_uninterrupted_one(small_study, tmp_path, monkeypatch):
    console = Console(record=True, width=100)
    whole_job, cut_job = (
        Job("rate-sensitivity", "quick", tmp_path / name, console) for name in ("whole", "cut")
    )
    rate_sensitivity.run(whole_job)
    assert "digits-mlp, sgd: median test accuracy" in console.export_text()
    run_interrupted(cut_job, monkeypatch)
    rate_sensitivity.run(cut_job)
    whole, cut = (pl.read_parquet(job.out / "runs.parquet") for job in (whole_job, cut_job))
    keys = ["schedule", "label", "seed", "learning_rate"]
    assert cut.sort(keys).drop("seconds").equals(whole.sort(keys).drop("seconds"))
    assert len(whole) == 7 * 2 + 3 * 7 * 2  # tuning; schedules x rates x seeds

    table = pl.read_csv(whole_job.out / "table.csv")
    recomputed = rate_sensitivity.summarize(whole)
    keys = ["schedule", "factor"]
    assert table.sort(keys)["accuracy"].to_list() == pytest.approx(
        recomputed.sort(keys)["accuracy"].to_list()
    )
    assert sorted(set(table["factor"])) == sorted(rate_sensitivity.FACTORS)
    lines = lines_of(rate_sensitivity.draw(recomputed, "title").axes[0])
    assert set(lines) == set(SMALL["schedules"])
    for schedule, (factors, accuracies) in lines.items():
        own = recomputed.filter(schedule=schedule).sort("factor")
        np.testing.assert_array_equal(factors, own["factor"])
        np.testing.assert_array_equal(accuracies, own["accuracy"])
    assert_is_drawn(whole_job.out / "rate_sensitivity.png", colors=3)
    assert "GreedyLR" in (whole_job.out / "report.html").read_text()


def rows(**columns):
    frame = pl.DataFrame({"task": "t", "optimizer": "o", "schedule": "cosine"} | columns)
    return frame.with_columns(label=pl.col("learning_rate").cast(pl.String))


def test_the_best_rate_is_chosen_on_seeds_that_are_not_reported():
    tuning = rows(
        seed=[1000, 1001, 1000, 1001], learning_rate=[0.1, 0.1, 1.0, 1.0], test_metric=[0.5, 0.9, 0.8, 0.8]
    )
    reported = rows(seed=[0, 1, 2, 0], learning_rate=[1.0, 1.0, 1.0, 0.001], test_metric=[0.1, 0.3, 0.9, 0.7])
    tuning, reported = (frame.with_columns(test_loss=pl.lit(1.0)) for frame in (tuning, reported))
    assert best_rates(tuning) == {("t", "o"): 1.0}
    table = rate_sensitivity.summarize(pl.concat([tuning, reported])).sort("factor")
    assert table["factor"].to_list() == [0.001, 1.0]
    assert table["accuracy"].to_list() == pytest.approx([70.0, 30.0])
    assert table["accuracy_low"].to_list() == pytest.approx([70.0, 10.0])
    assert table["accuracy_high"].to_list() == pytest.approx([70.0, 90.0])


def test_an_incomplete_part_is_not_read(tmp_path):
    store = RunStore(tmp_path, {"steps": 1})
    store.append([{"task": "t", "seed": 0}])
    (tmp_path / "parts" / ".123-000001.parquet").write_bytes(b"PAR1")
    again = RunStore(tmp_path, {"steps": 1})
    assert again.rows()["seed"].to_list() == [0]
    again.append([{"task": "t", "seed": 1}])
    assert again.finish()["seed"].to_list() == [0, 1]


@pytest.fixture
def page(tmp_path):
    figure = go.Figure()
    figure.add_scatter(x=[1, 2, 3], y=[1, 4, 9], name="squares")
    figure.add_scatter(x=[1, 2, 3], y=[1, 8, 27], name="cubes")
    table = html.Table(("name", "value <1>"), [("squares", "9"), ("cubes & more", "27")])
    path = tmp_path / "report.html"
    html.write_page(path, "Powers", "Made by hand.", [html.Section("First", "Two curves.", [figure, table])])
    return path


def test_a_page_is_self_contained(page):
    text = page.read_text()
    assert "value &lt;1&gt;" in text and "cubes &amp; more" in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=\"http", text)
    with pytest.raises(UsageError, match="cannot write"):
        html.write_page(page / "below" / "a.html", "", "", [])


@pytest.mark.skipif(not HAS_BROWSER, reason="needs Chromium and its driver")
def test_a_page_opens_in_a_browser_without_errors_and_its_plots_react(page):
    open_and_click(page)


def test_the_objectives_of_the_theory_study_have_the_stated_smoothness():
    for objective in theory.OBJECTIVES.values():
        value = lambda x, objective=objective: objective.value(20.0, x)  # noqa: E731
        zero = jnp.zeros(theory.DIMENSIONS)
        assert value(zero) == 0
        np.testing.assert_allclose(estimate_smoothness(value, zero, num_iterations=500), 20.0, rtol=1e-3)
        for seed in range(3):
            away = 3 * jax.random.normal(jax.random.key(seed), zero.shape)
            assert estimate_smoothness(value, away) <= 20.0 * 1.001
            assert value(away) > 0


def test_the_final_loss_in_units_of_the_smoothness_does_not_depend_on_it():
    """With rates in units of 1/L and a relative threshold, a rescaled loss is the same problem."""
    losses = [
        float(theory.final_loss("quadratic", "sgd", jnp.float32(smoothness), 0.9, 0.1, 0.0, 0)) / smoothness
        for smoothness in (2.0, 32.0)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_the_theory_study_ranks_the_factor_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setitem(theory.PRESETS, "quick", {"starts": 3})
    monkeypatch.setattr(theory, "SMOOTHNESS", (2.0, 20.0))
    monkeypatch.setattr(theory, "STEPS", 50)
    monkeypatch.setattr(theory, "OBJECTIVES", {"quadratic": theory.OBJECTIVES["quadratic"]})
    theory.run(Job("theory", "quick", tmp_path, Console(record=True, width=100)))
    runs = pl.read_parquet(tmp_path / "runs.parquet")
    assert set(runs["factor"]) == {*theory.FACTORS, 0.5, 0.95}
    table = theory.summarize(runs)
    assert len(table) == 2 * len(theory.INITIAL_RATES) * len(theory.NOISES)
    row = table.row(0, named=True)
    cell = runs.filter(
        (pl.col("objective") == row["objective"])
        & (pl.col("smoothness") == row["smoothness"])
        & (pl.col("initial_rate") == row["initial_rate"])
        & (pl.col("noise") == row["noise"])
    )
    medians = {
        factor: float(np.median(cell.filter(pl.col("factor") == factor)["loss"]))
        for factor in set(cell["factor"])
    }
    assert row["best_loss"] == min(medians.values())
    assert row["claimed_loss"] == medians[0.5]
    assert row["claimed_rank"] == 1 + sum(loss < medians[0.5] for loss in medians.values())
    assert row["claimed_factor"] == 0.5
    assert_is_drawn(tmp_path / "theory.png", colors=3)
    assert pl.read_csv(tmp_path / "table.csv").equals(table)
    figure = theory.draw(runs)
    lines = lines_of(figure.axes[0])
    label = f"L = {row['smoothness']:g}, rate {row['initial_rate']:g}/L"
    np.testing.assert_array_equal(lines[label][0], sorted(medians))
    np.testing.assert_array_equal(lines[label][1], [medians[factor] for factor in sorted(medians)])
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert {float(dot.get_xdata()[0]) for dot in dots} == {0.5, 0.95}
