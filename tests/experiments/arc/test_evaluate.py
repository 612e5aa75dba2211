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
from experiments.arc.evaluate import ALWAYS_RAISE, ARC, ARC_NO_VALIDATION, PASSIVE_SCHEDULES, RANDOM_ACTION
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


def full_table(arc=0.9, passive=0.8, raising=0.8):
    levels = {ARC: arc, ALWAYS_RAISE: raising}
    rows = [
        make_run(schedule, rate, (0.1, levels.get(schedule, passive) - 0.1 * place, 0.2), seed)
        for schedule in (*PASSIVE_SCHEDULES, ALWAYS_RAISE, RANDOM_ACTION, ARC, ARC_NO_VALIDATION)
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


@pytest.mark.parametrize(
    ("arc", "raising", "best_cells", "holds"),
    [
        (0.9, 0.8, 3, True),
        (0.9, 0.9, 3, False),  # always raising does as well
        (0.9, 0.95, 3, False),
        (0.8, 0.7, 3, False),  # ties with the passive schedules
        (0.7, 0.6, 0, False),
    ],
)
def test_the_claim_compares_arc_with_passive_schedules_and_with_always_raising(
    arc, raising, best_cells, holds
):
    claim = evaluate.claim(frame(full_table(arc, raising=raising)), "image")
    assert (claim.best_cells, claim.holds) == (best_cells, holds)
    assert claim.text.endswith("the paper's claim holds." if holds else "the paper's claim does not hold.")
    relation = {True: "better than", False: "worse than"}.get(arc > raising, "")
    assert (relation if arc != raising else "not distinguishable from") in claim.text


def test_weights_that_always_raise_do_not_fulfil_the_claim():
    """From rates that are too low every controller that raises is better than every passive schedule."""
    rows = [row for row in full_table(raising=0.9) if row["schedule"] != ARC]
    rows += [row | {"schedule": ARC} for row in rows if row["schedule"] == ALWAYS_RAISE]
    claim = evaluate.claim(frame(rows), "image")
    assert claim.worst_is_best and not claim.beats_raising and not claim.holds


def test_arc_is_paired_with_its_controls_by_seed():
    raised = np.repeat([1.0, 1.618, 1.618**2], 2)
    rows = [
        make_run(schedule, rate, (0.5 + 0.1 * seed + gain,), seed, rates=raised)
        for schedule, gain in ((ARC, 0.03), (ALWAYS_RAISE, 0.0), ("constant", 0.05), (RANDOM_ACTION, 0.01))
        for rate in RATES
        for seed in range(3)
    ]
    table = evaluate.against(frame(rows))
    assert len(table) == 3 * (len(RATES) + 1)
    cells = {(row["control"], row["learning_rate"]): row for row in table.iter_rows(named=True)}
    for rate in (*RATES, None):
        # The same difference in each seed, although the seeds differ by more.
        raising = cells[ALWAYS_RAISE, rate]
        assert [raising[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx([3.0] * 3)
        assert raising["different"] == pytest.approx(80)  # two of ten decisions are to raise
        assert cells["constant", rate]["different"] == pytest.approx(20)
        assert cells["constant", rate]["difference"] == pytest.approx(-2.0)
        assert cells[RANDOM_ACTION, rate]["different"] is None


def test_perplexities_are_compared_by_their_logarithm_and_infinite_ones_as_the_highest():
    rows = [
        make_run(schedule, rate, (0.1,), seed, case="language", losses=(loss,))
        for schedule, loss in (
            (ARC, 2.0),
            (ALWAYS_RAISE, float("inf")),
            ("constant", 3.0),
            (RANDOM_ACTION, 2.5),
        )
        for rate in (10.0, 1.0, 0.1)
        for seed in range(2)
    ]
    table = evaluate.against(frame(rows)).filter(learning_rate=1.0)
    gains = dict(table.select("control", "difference").iter_rows())
    assert gains == pytest.approx({ALWAYS_RAISE: 1.0, "constant": 1.0, RANDOM_ACTION: 0.5})


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
        make_run(schedule, rate, (0.1,), seed, case="language", losses=(2.0 if schedule == ARC else 3.0,))
        for schedule in (*PASSIVE_SCHEDULES, ALWAYS_RAISE, RANDOM_ACTION, ARC)
        for rate in (10.0, 1.0, 0.1)
        for seed in range(2)
    ]
    assert evaluate.claim(frame(rows), "language").holds


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
        assert set(lines) == {
            *PASSIVE_SCHEDULES, ALWAYS_RAISE, RANDOM_ACTION, ARC, ARC_NO_VALIDATION, "one-cycle", "Armijo",
        }  # fmt: skip
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


def test_the_figure_of_failures_shows_every_run_of_arc_from_the_rate_where_it_fails():
    rows = spread_table()
    for row in rows:
        if row["schedule"] == ARC and row["learning_rate"] == RATES[1] and row["seed"] == 1:
            row["test_metrics"] = [0.1, 0.3]
    figure = evaluate.draw_failures(frame(rows))
    metric, rates = figure.axes
    assert metric.get_title() == "digits, from 0.001: accuracy, %"
    assert "33% below every constant rate" in rates.get_title()
    labels = {line.get_label(): line.get_ydata() for line in metric.lines}
    assert len(labels) == len(rates.lines) == 3
    np.testing.assert_allclose(labels["seed 1, the worst"], [10, 30])


def test_the_figure_of_range_tests_marks_the_suggested_rate():
    tested = pl.DataFrame(
        {
            "case": ["image"] * 4, "learning_rate": [0.01, 0.1, 1.0, 10.0], "loss": [2.0, 1.0, 3.0, 9.0],
            "smoothed": [2.0, 1.5, 2.5, float("inf")], "suggested": [0.1] * 4,
        }
    )  # fmt: skip
    (axes,) = evaluate.draw_range_test(tested).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"loss of the batch", "smoothed", "0.1"}
    np.testing.assert_allclose(lines["smoothed"].get_ydata(), [2.0, 1.5, 2.5])
    assert evaluate.suggested_rate(tested) == 0.1


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
        ("against", evaluate.against(runs)),
    ):
        written = pl.read_csv(tmp_path / f"evaluation/{name}.csv")
        for column in table.columns:
            assert written[column].to_list() == pytest.approx(table[column].to_list(), nan_ok=True)
    claim = evaluate.claim(runs, "image")
    assert claim.text in " ".join(ended.stdout.split())
    assert not claim.holds  # these weights are useless
    pictures = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.glob("*/*.png")}
    assert pictures.keys() == {
        "candidates/training.png", "selection/selection.png", "evaluation/histories.png",
        "evaluation/runs.png", "evaluation/frequency.png", "evaluation/failures.png",
        "evaluation/range_test.png",
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
