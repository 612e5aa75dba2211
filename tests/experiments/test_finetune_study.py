"""The study of fine-tuning: its tables, and a killed and resumed study."""

import math
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from experiments.studies import finetune
from experiments.tasks import TASKS, make_task
from experiments.tasks.pretraining import SIZES
from tests.experiments.figures import lines_of

SMALL = {
    "network": "quick",
    "tasks": ("digits-finetuned",),
    "disturbed": ("digits-finetuned",),
    "steps": 40,
    "seeds": 2,
}


def use_tiny_networks(monkeypatch):
    """Replaces the networks of the preset quick by those of tests, in a cache folder of their own."""
    monkeypatch.setitem(SIZES, "quick", SIZES["tiny"])
    make_task.cache_clear()  # tasks contain pretrained weights


SCHEDULES = finetune.SCHEDULES
LOSSES = {"constant": 1.0, "linear": 2.0, "cosine": 2.0, "warmup": 1.5, "GreedyLR": 1.0}


def synthetic(spread=0.1, steps=40):
    """Two tasks, two rates (the higher one halves the losses), three seeds; wrong labels in one task."""
    rows = []
    for task in ("a", "b", "b+wrong-labels-at-20"):
        for rate in (0.1, 1.0) if "+" not in task else (1.0,):
            for schedule in SCHEDULES:
                for seed in range(3):
                    level = LOSSES[schedule] * (0.5 if rate == 1.0 else 1.0)
                    level += spread * seed * (0.5 if schedule == "GreedyLR" else 1.0)
                    if schedule == "GreedyLR" and rate == 1.0:
                        level += 0.2
                    loss = np.full(steps, level)
                    if "+" in task:
                        loss[20:25] = 9.0
                        loss[25:] += 5.0 * (schedule == "cosine")
                    rows.append(
                        {
                            "task": task,
                            "optimizer": "adamw",
                            "schedule": schedule,
                            "learning_rate": rate,
                            "seed": seed,
                            "steps": steps,
                            "test_metric": 1 / (1 + level),
                            "loss": loss.tolist(),
                            "rate": np.full(steps, rate).tolist(),
                        }
                    )
    return pl.DataFrame(rows)


def test_each_task_rate_and_schedule_has_a_row_with_its_band():
    table = finetune.summarize(synthetic())
    assert len(table) == 2 * 2 * 5 and set(table["task"]) == {"a", "b"}
    row = table.filter(task="a", schedule="linear", learning_rate=0.1).row(0, named=True)
    assert row["loss_100"] == pytest.approx(2.1) and row["band"] == pytest.approx(0.2)
    assert row["difference"] == pytest.approx(1.05) and row["test_metric"] == pytest.approx(100 / 3.1)


def test_the_best_rate_of_each_schedule_has_the_lowest_loss():
    best = finetune.best_rates(finetune.summarize(synthetic()))
    assert len(best) == 2 * 5 and set(best["learning_rate"]) == {1.0}
    row = best.filter(task="b", schedule="cosine").row(0, named=True)
    assert row["test_metric"] == pytest.approx(100 / 2.1) and row["worst"] == pytest.approx(100 / 3.1)


def test_claims_compare_greedylr_with_each_schedule_at_each_rate():
    claims = finetune.compare(synthetic())
    assert len(claims) == 2 * 4
    linear = claims.filter(rate="low", schedule="linear").row(0, named=True)
    assert (linear["experiments"], linear["lower"], linear["higher"]) == (2, 2, 0)
    assert linear["ratio"] == pytest.approx(1.05 / 2.1) and linear["narrower"] == 100
    assert linear["metric"] == pytest.approx(100 / 2.05 - 100 / 3.1)
    constant = claims.filter(rate="middle", schedule="constant").row(0, named=True)
    assert (constant["lower"], constant["higher"]) == (0, 2) and constant["ratio"] == pytest.approx(
        0.75 / 0.6
    )
    assert finetune.conclude(claims) == " ".join(
        f"From the {position} initial rate GreedyLR's final loss is significantly lower in {lower} and "
        f"significantly higher in {higher} of 8 comparisons (tasks x schedules)."
        for position, lower, higher in (("low", 6, 0), ("middle", 4, 2))
    )


def test_a_diverged_run_has_an_infinite_band():
    runs = synthetic().with_columns(
        loss=pl.when((pl.col("schedule") == "linear") & (pl.col("seed") == 0))
        .then(pl.lit([math.nan] * 40))
        .otherwise(pl.col("loss"))
    )
    assert finetune.summarize(runs).filter(schedule="linear")["band"].to_list() == [math.inf] * 4


def test_recovery_counts_from_the_last_wrong_batch():
    table = finetune.recovery_table(synthetic())
    assert len(table) == 5 and set(table["task"]) == {"b"}
    recovered = table.filter(schedule="constant").row(0, named=True)
    assert recovered["recovery"] == 10 and recovered["recovered"] == 100
    assert recovered["damage"] == pytest.approx(1) and recovered["points_below"] == 0
    not_recovered = table.filter(schedule="cosine").row(0, named=True)
    assert not_recovered["recovery"] == math.inf and not_recovered["recovered"] == 0
    assert not_recovered["damage"] == pytest.approx(6.1 / 1.1)


def test_figures_show_every_schedule():
    runs = synthetic()
    table = finetune.summarize(runs)
    for figure, count in (
        (finetune.draw_histories(runs), 2),
        (finetune.draw_rates(table), 2),
        (finetune.draw_recovery(runs), 1),
    ):
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert len(panels) == count
        assert all(set(lines_of(axes)) == set(SCHEDULES) for axes in panels)
    rates, metrics = lines_of(finetune.draw_rates(table).axes[0])["linear"]
    np.testing.assert_allclose(rates, [0.1, 1.0])
    np.testing.assert_allclose(metrics, [100 / 3.1, 100 / 2.1])


def test_presets_name_tasks_that_exist():
    for preset in finetune.PRESETS.values():
        assert set(preset["disturbed"]) <= set(preset["tasks"])
        suffix = "" if preset["network"] == "quick" else "-full"
        assert set(preset["tasks"]) <= TASKS.keys()
        assert all(task.endswith("-full") == (suffix == "-full") for task in preset["tasks"])


STUDY = f"""
import sys
from pathlib import Path
from rich.console import Console
from experiments import pretraining
from experiments.studies import finetune
from experiments.studies.base import Job
from experiments.tasks.pretraining import SIZES
from experiments.training import engine

engine.SECONDS_PER_CALL = 0.0  # a part for each two runs
SIZES["quick"] = SIZES["tiny"]._replace(image_steps=500)
pretraining.CHUNK = 1  # the file of the unfinished pretraining exists for 499 steps
finetune.PRESETS["quick"] = {SMALL!r}
engine.configure(2)
finetune.run(Job("finetune", "quick", Path(sys.argv[1]), Console(quiet=True)))
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", STUDY, str(folder)])


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """Killed during the pretraining, then during the study; the cache folders are separate."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    ends = {}
    for name in ("whole", "killed"):
        out, cache = tmp_path / name, tmp_path / f"cache-{name}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for pattern in (
            ("*/pretrained/image*.unfinished*", "parts/000002.parquet") if name == "killed" else ()
        ):
            folder = cache if "pretrained" in pattern else out
            process = start(out)
            while process.poll() is None and not list(folder.glob(pattern)):
                time.sleep(0.02)
            assert process.poll() is None, f"finished before {pattern} was written"
            process.kill()
            process.wait()
            assert not (out / "runs.parquet").exists()
        assert start(out).wait() == 0
        ends[name] = pl.read_parquet(out / "runs.parquet").drop("seconds")
    keys = ["task", "schedule", "learning_rate", "seed"]
    assert len(ends["whole"]) == 3 * 5 * 2 + 5 * 2
    assert ends["killed"].sort(keys).equals(ends["whole"].sort(keys))
