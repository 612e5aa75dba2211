"""Selection and evaluation of ARC: tables, figures, and the whole pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments.arc import evaluate, select
from experiments.arc.evaluate import ARC, ARC_NO_VALIDATION, PASSIVE_SCHEDULES
from experiments.errors import UsageError
from experiments.studies.base import Job
from greedylr_jax.arc import load_weights
from tests.experiments.browser import HAS_BROWSER, open_and_click

RATES = (1e-2, 1e-3, 1e-4)


def make_run(schedule, rate, metrics, seed=0, case="image", losses=(1.0,), rates=(1.0, 1.0), every=None):
    return {
        "case": case, "schedule": schedule, "learning_rate": rate, "seed": seed, "every": every,
        "test_metrics": list(metrics), "test_losses": list(losses), "rate": [rate * each for each in rates],
    }  # fmt: skip


def frame(rows):
    return pl.DataFrame(rows, schema_overrides={"every": pl.Int64}, infer_schema_length=None)


def full_table(arc=0.9, passive=0.8):
    rows = [
        make_run(schedule, rate, (0.1, (arc if schedule == ARC else passive) - 0.1 * place, 0.2), seed)
        for schedule in (*PASSIVE_SCHEDULES, ARC, ARC_NO_VALIDATION)
        for place, rate in enumerate(RATES)
        for seed in range(3)
    ]
    rows += [make_run("one-cycle", 0.5, (0.7,), seed) for seed in range(3)]
    return rows + [make_run("Armijo", 1.0, (0.6 + 0.1 * seed,), seed) for seed in range(3)]


def test_a_cell_is_the_median_of_the_best_metrics_of_runs():
    table = evaluate.summarize(frame(full_table()))
    cells = {row["schedule"]: row for row in table.iter_rows(named=True)}
    assert [cells[ARC][name] for name in ("high", "middle", "low", "worst")] == pytest.approx(
        [90, 80, 70, 70]
    )
    assert [cells["cosine"][name] for name in ("high", "low")] == pytest.approx([80, 60])
    # Schedules that choose their own rate have the same score in every column.
    assert [cells["one-cycle"][name] for name in ("high", "middle", "low")] == pytest.approx([70] * 3)
    assert cells["Armijo"]["worst"] == pytest.approx(70)


@pytest.mark.parametrize(("arc", "holds"), [(0.9, True), (0.8, False), (0.7, False)])
def test_the_claim_compares_the_worst_of_three_rates(arc, holds):
    table = evaluate.summarize(frame(full_table(arc=arc)))
    assert evaluate.claim(table, "image")[0] is holds
    assert ("does not hold" in evaluate.claim(table, "image")[1]) is not holds


def test_lower_perplexities_are_better_and_a_run_without_a_finite_loss_scores_infinity():
    runs = frame(
        [
            make_run(ARC, 1.0, (0.1,), case="language", losses=(3.0, 2.0, 5.0)),
            make_run(ARC, 1.0, (0.1,), case="language", losses=(float("nan"), float("inf"))),
            make_run(ARC, 1.0, (0.1,), case="language", losses=(float("nan"), 4.0)),
        ]
    )
    np.testing.assert_allclose(evaluate.scores(runs)["score"], np.exp([2.0, np.inf, 4.0]))
    rows = [
        make_run(schedule, rate, (0.1,), case="language", losses=(2.0 if schedule == ARC else 3.0,))
        for schedule in (*PASSIVE_SCHEDULES, ARC)
        for rate in (10.0, 1.0, 0.1)
    ]
    assert evaluate.claim(evaluate.summarize(frame(rows)), "language")[0]


def test_decisions_are_inferred_from_the_rates():
    up_and_down = [1.0, 1.618, 1.618, 1.0, 0.618, 0.382, 0.618]
    rows = [make_run("constant", 1e-3, (0.5 + 0.1 * seed,), seed) for seed in range(3)]
    rows += [
        make_run(ARC, 1e-3, (metric,), seed, rates=up_and_down) for seed, metric in enumerate((0.6, 0.4))
    ]
    (row,) = evaluate.decisions(frame(rows)).iter_rows(named=True)
    assert (row["raised"], row["lowered"], row["unchanged"]) == (2, 3, evaluate.DECISIONS - 5)
    assert row["final_rate"] == pytest.approx(0.618e-3)
    assert row["turned_up"] == 1  # from 0.382 to 0.618
    assert row["failed"] == 0.5  # below the worst constant rate


def test_runs_at_other_intervals_are_not_in_the_tables():
    rows = full_table()
    rows += [make_run(ARC, rate, (0.1 * every,), every=every) for every in (2, 1) for rate in RATES]
    table = evaluate.by_frequency(frame(rows))
    assert table["every"].to_list() == [1, 2]
    assert table["median"].to_list() == pytest.approx([10, 20])
    assert table.columns == ["every", "median", "minimum", "maximum"]
    assert evaluate.summarize(frame(rows)).equals(evaluate.summarize(frame(full_table())))


def spread_table():
    """The full table with runs whose scores differ between seeds: 100 times 0.5, 0.7 and 0.6."""
    rows = full_table()
    for row in rows:
        row["test_metrics"] = [0.1, 0.5 + 0.1 * (row["seed"] * 2 % 3)]
        row["rate"] = [row["learning_rate"], row["learning_rate"] * (1 + row["seed"])]
    return rows


def test_the_figure_of_histories_shows_metric_and_rate_of_the_median_runs():
    figure = evaluate.draw_histories(frame(spread_table()))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 2 * len(RATES)
    for rate, metric, rates in zip(RATES, panels[::2], panels[1::2], strict=True):
        assert f"from {rate:g}" in metric.get_title()
        lines = {line.get_label(): line for line in metric.lines}
        assert set(lines) == {*PASSIVE_SCHEDULES, ARC, ARC_NO_VALIDATION, "one-cycle", "Armijo"}
        np.testing.assert_allclose(lines[ARC].get_ydata(), [10, 60])
        (line,) = (line for line in rates.lines if line.get_label() == ARC)
        np.testing.assert_allclose(line.get_ydata(), [rate, 3 * rate])  # of seed 2, whose score is the median


def test_the_figure_of_runs_has_a_box_of_the_scores_of_each_schedule():
    figure = evaluate.draw_runs(frame(spread_table()))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(RATES)
    for axes in panels:
        assert [tick.get_text() for tick in axes.get_xticklabels()][:1] == ["constant"]
        assert axes.patches[0].get_path().get_extents().get_points()[:, 1] == pytest.approx(
            [55, 65]
        )  # the quartiles


def test_the_figure_of_intervals_has_a_box_for_each():
    rows = [make_run(ARC, rate, (0.1 * every,), every=every) for every in (2, 1) for rate in RATES]
    (axes,) = evaluate.draw_frequency(frame(rows)).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2"]
    boxes = [patch.get_path().get_extents().get_points()[:, 1].tolist() for patch in axes.patches]
    assert boxes == [pytest.approx([10, 10]), pytest.approx([20, 20])]


def test_the_published_tables_are_those_of_the_paper():
    table = evaluate.published_tables()
    assert set(table["case"]) == set(evaluate.CASES) and len(table) == 24
    cell = dict(table.filter(pl.col("case") == "image").select("schedule", "low").iter_rows())
    assert (cell["ARC"], cell["cosine"], cell["rate"]) == (91.87, 88.22, 0.0001)


def test_the_candidate_with_the_highest_mean_is_first():
    runs = frame(
        [
            make_run(name, rate, (0.2, metric), seed)
            for name, metrics in (("candidate-00", (0.9, 0.9, 0.1)), ("candidate-01", (0.7, 0.7, 0.65)))
            for rate, metric in zip(select.LEARNING_RATES, metrics, strict=True)
            for seed in range(2)
        ]
    )
    table = select.summarize(runs)
    assert table["schedule"].to_list() == ["candidate-01", "candidate-00"]
    assert table.row(1)[1:] == pytest.approx((90, 90, 20, 200 / 3))


def test_a_folder_without_candidates_is_an_error(tmp_path):
    job = Job("select", "tiny", tmp_path / "out", Console(quiet=True), command="arc")
    with pytest.raises(UsageError, match="arc train"):
        select.select(tmp_path, job, select.SelectionSettings(60, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_pipeline_runs_from_one_command(tmp_path):
    # A cache of its own, so that the programs are compiled as on the first run.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "experiments", "arc", "all", "--preset", "tiny", "--out"]
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=root, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    samples = pl.read_parquet(tmp_path / "samples/runs.parquet")
    assert len(samples) > 100 and set(samples["label"]) == {0, 1, 2}
    selected = load_weights(tmp_path / "selection/arc.safetensors")
    selection = pl.read_csv(tmp_path / "selection/selection.csv")
    best = next(name for name in selection["schedule"] if name.startswith("candidate"))
    expected = load_weights(tmp_path / f"candidates/{best}.safetensors")
    assert selected.keys() == expected.keys() and len(selected) > 0
    assert all(np.array_equal(selected[name], expected[name]) for name in selected)
    runs = pl.read_parquet(tmp_path / "evaluation/runs.parquet")
    for name, table in (
        ("table", evaluate.summarize(runs)),
        ("frequency", evaluate.by_frequency(runs)),
        ("decisions", evaluate.decisions(runs)),
    ):
        written = pl.read_csv(tmp_path / f"evaluation/{name}.csv")
        for column in table.columns:
            assert written[column].to_list() == pytest.approx(table[column].to_list())
    assert evaluate.claim(evaluate.summarize(runs), "image")[1] in " ".join(ended.stdout.split())
    pictures = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.glob("*/*.png")}
    assert pictures.keys() == {
        "candidates/training.png", "selection/selection.png", "evaluation/histories.png",
        "evaluation/runs.png", "evaluation/frequency.png",
    }  # fmt: skip
    for path in pictures.values():
        assert matplotlib.image.imread(path)[..., :3].std() > 0.03, path  # not blank
    assert "arc evaluate --preset tiny" in (tmp_path / "evaluation/report.html").read_text()
    if HAS_BROWSER:
        open_and_click(tmp_path / "evaluation/report.html")
    again = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=root, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0 and not again.stdout  # all stages are finished
