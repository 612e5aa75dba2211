"""Selection and evaluation of ARC: what their tables mean, and that the whole pipeline runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments.arc import evaluate, select
from experiments.arc.evaluate import BLIND, OURS, PASSIVE
from experiments.errors import UsageError
from experiments.studies.base import Job
from greedylr_jax.arc import load_weights
from tests.experiments.browser import HAS_BROWSER, open_and_click

RATES = (1e-2, 1e-3, 1e-4)


def made_run(schedule, rate, metrics, seed=0, case="image", losses=(1.0,), rates=(1.0, 1.0), every=None):
    return {
        "case": case, "schedule": schedule, "learning_rate": rate, "seed": seed, "every": every,
        "test_metrics": list(metrics), "test_losses": list(losses), "rate": [rate * each for each in rates],
    }  # fmt: skip


def frame(rows):
    return pl.DataFrame(rows, schema_overrides={"every": pl.Int64}, infer_schema_length=None)


def whole_table(ours=0.9, passive=0.8):
    rows = [
        made_run(schedule, rate, (0.1, (ours if schedule == OURS else passive) - 0.1 * place, 0.2), seed)
        for schedule in (*PASSIVE, OURS, BLIND)
        for place, rate in enumerate(RATES)
        for seed in range(3)
    ]
    rows += [made_run("one-cycle", 0.5, (0.7,), seed) for seed in range(3)]
    return rows + [made_run("Armijo", 1.0, (0.6 + 0.1 * seed,), seed) for seed in range(3)]


def test_a_cell_is_the_median_of_the_best_metrics_of_runs():
    table = evaluate.summarize(frame(whole_table()))
    cells = {row["schedule"]: row for row in table.iter_rows(named=True)}
    assert [cells[OURS][name] for name in ("high", "middle", "low", "worst")] == pytest.approx(
        [90, 80, 70, 70]
    )
    assert [cells["cosine"][name] for name in ("high", "low")] == pytest.approx([80, 60])
    # What chooses its own rate stands in every column.
    assert [cells["one-cycle"][name] for name in ("high", "middle", "low")] == pytest.approx([70] * 3)
    assert cells["Armijo"]["worst"] == pytest.approx(70)


@pytest.mark.parametrize(("ours", "holds"), [(0.9, True), (0.8, False), (0.7, False)])
def test_the_claim_is_about_the_worst_of_three_rates(ours, holds):
    table = evaluate.summarize(frame(whole_table(ours=ours)))
    assert evaluate.claim(table, "image")[0] is holds
    assert ("does not hold" in evaluate.claim(table, "image")[1]) is not holds


def test_a_perplexity_is_better_when_it_is_lower_and_infinite_when_it_never_was_finite():
    runs = frame(
        [
            made_run(OURS, 1.0, (0.1,), case="language", losses=(3.0, 2.0, 5.0)),
            made_run(OURS, 1.0, (0.1,), case="language", losses=(float("nan"), float("inf"))),
            made_run(OURS, 1.0, (0.1,), case="language", losses=(float("nan"), 4.0)),
        ]
    )
    np.testing.assert_allclose(evaluate.scores(runs)["score"], np.exp([2.0, np.inf, 4.0]))
    rows = [
        made_run(schedule, rate, (0.1,), case="language", losses=(2.0 if schedule == OURS else 3.0,))
        for schedule in (*PASSIVE, OURS)
        for rate in (10.0, 1.0, 0.1)
    ]
    assert evaluate.claim(evaluate.summarize(frame(rows)), "language")[0]


def test_what_was_done_is_read_off_the_rates():
    up_and_down = [1.0, 1.618, 1.618, 1.0, 0.618, 0.382, 0.618]
    rows = [made_run("constant", 1e-3, (0.5 + 0.1 * seed,), seed) for seed in range(3)]
    rows += [
        made_run(OURS, 1e-3, (metric,), seed, rates=up_and_down) for seed, metric in enumerate((0.6, 0.4))
    ]
    (row,) = evaluate.decisions(frame(rows)).iter_rows(named=True)
    assert (row["raised"], row["lowered"], row["kept"]) == (2, 3, evaluate.DECISIONS - 5)
    assert row["final_rate"] == pytest.approx(0.618e-3)
    assert row["turned_up"] == 1  # from 0.382 to 0.618
    assert row["failed"] == 0.5  # below the worst constant rate


def test_frequencies_are_apart_from_the_tables():
    rows = whole_table()
    rows += [made_run(OURS, rate, (0.1 * every,), every=every) for every in (2, 1) for rate in RATES]
    table = evaluate.by_frequency(frame(rows))
    assert table["every"].to_list() == [1, 2]
    assert table["median"].to_list() == pytest.approx([10, 20])
    assert evaluate.summarize(frame(rows)).equals(evaluate.summarize(frame(whole_table())))


def test_the_paper_s_tables_are_typed_off():
    table = evaluate.printed()
    assert set(table["case"]) == set(evaluate.CASES) and len(table) == 24
    cell = dict(table.filter(pl.col("case") == "image").select("schedule", "low").iter_rows())
    assert (cell["ARC"], cell["cosine"], cell["rate"]) == (91.87, 88.22, 0.0001)


def test_the_candidate_with_the_best_mean_is_chosen():
    runs = frame(
        [
            made_run(name, rate, (0.2, metric), seed)
            for name, metrics in (("candidate-00", (0.9, 0.9, 0.1)), ("candidate-01", (0.7, 0.7, 0.65)))
            for rate, metric in zip(select.LEARNING_RATES, metrics, strict=True)
            for seed in range(2)
        ]
    )
    table = select.summarize(runs)
    assert table["schedule"].to_list() == ["candidate-01", "candidate-00"]
    assert table.row(1)[1:] == pytest.approx((90, 90, 20, 200 / 3))


def test_a_folder_without_candidates_is_refused(tmp_path):
    job = Job("select", "tiny", tmp_path / "out", Console(quiet=True), command="arc")
    with pytest.raises(UsageError, match="arc train"):
        select.select(tmp_path, job, select.Sizes(60, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_pipeline_runs_from_one_command(tmp_path):
    # Compiled programs are not shared with other runs: this is a first one.
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
    chosen = load_weights(tmp_path / "selection/arc.safetensors")
    selection = pl.read_csv(tmp_path / "selection/selection.csv")
    best = next(name for name in selection["schedule"] if name.startswith("candidate"))
    same = load_weights(tmp_path / f"candidates/{best}.safetensors")
    assert all(np.array_equal(chosen[name], same[name]) for name in chosen)
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
    for picture in tmp_path.glob("*/*.png"):
        assert picture.stat().st_size > 10_000
    assert "arc evaluate --preset tiny" in (tmp_path / "evaluation/report.html").read_text()
    if HAS_BROWSER:
        open_and_click(tmp_path / "evaluation/report.html")
    again = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=root, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0 and not again.stdout  # nothing is left to do
