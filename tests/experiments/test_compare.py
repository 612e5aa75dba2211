"""The comparison end to end on real data, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from experiments import cli

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "40", "--seeds", "2", "--optimizer", "sgd", "--learning-rates", "0.05,0.5")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation cache for all processes of this file."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "130"}


def run(environment, *arguments, program=("-m", "experiments")):
    return subprocess.run(
        [sys.executable, *program, "compare", *arguments],
        check=False,
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, run(environment, *SMALL, "--out", str(out))


def check_that_it_leaves_a_table_figures_and_rows(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    assert "sgd from 0.05" in process.stdout and "GreedyLR" in process.stdout
    assert "1 training programs" in process.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "histories.png", "runs.parquet", "settings.json", "table.csv", "table.png",
    ]  # fmt: skip
    runs = pl.read_parquet(out / "runs.parquet")
    assert len(runs) == 5 * 2 * 2  # schedules, rates, seeds
    assert runs["loss"].list.len().unique().to_list() == [40]
    for name in ("histories.png", "table.png"):
        image = matplotlib.image.imread(out / name)
        assert min(image.shape[:2]) > 300 and image.std() > 0.02  # not empty


def check_that_all_schedules_of_a_seed_start_alike_and_train(finished):
    runs = pl.read_parquet(finished[0] / "runs.parquet")
    firsts = runs.with_columns(first=pl.col("loss").list.first(), last=pl.col("loss").list.last())
    assert firsts.group_by("seed").agg(pl.col("first").n_unique())["first"].to_list() == [1, 1]
    assert firsts["first"].n_unique() == 2  # and the two seeds differ
    assert (firsts["last"] < firsts["first"]).mean() > 0.9


def check_that_each_schedule_has_its_rates(finished):
    runs = pl.read_parquet(finished[0] / "runs.parquet").filter(learning_rate=0.5, seed=0)
    rates = {row["schedule"]: np.array(row["rate"]) for row in runs.iter_rows(named=True)}
    steps = np.arange(40)
    np.testing.assert_allclose(rates["constant"], 0.5)
    np.testing.assert_allclose(rates["linear"], 0.5 * (1 - steps / 40), rtol=1e-5)
    np.testing.assert_allclose(rates["cosine"], 0.25 * (1 + np.cos(np.pi * steps / 40)), rtol=1e-4)
    assert rates["GreedyLR"].max() > 0.5  # the loss falls, so the rate rises


# Ctrl-C at a moment that does not depend on how fast the machine is: once the first group of runs is kept.
INTERRUPTED = """
import os, signal
from experiments import cli
from experiments.training.store import RunStore

append = RunStore.append

def append_and_interrupt(self, rows):
    append(self, rows)
    os.kill(os.getpid(), signal.SIGINT)

RunStore.append = append_and_interrupt
cli.main()
"""


def check_that_an_interrupted_comparison_goes_on_and_ends_the_same(environment, finished, tmp_path):
    out = tmp_path / "interrupted"
    process = run(environment, *SMALL, "--out", str(out), program=("-c", INTERRUPTED))
    assert process.returncode == 130 and "goes on where this one stopped" in process.stderr
    assert not (out / "runs.parquet").exists()
    (part,) = (out / "parts").iterdir()
    assert 0 < len(pl.read_parquet(part)) < len(pl.read_parquet(finished[0] / "runs.parquet"))

    other = run(environment, *SMALL[:-1], "0.1", "--out", str(out))
    assert other.returncode == 2
    assert "unfinished comparison with other settings" in other.stderr

    assert run(environment, *SMALL, "--out", str(out)).returncode == 0
    keys = ["schedule", "learning_rate", "seed"]
    resumed = pl.read_parquet(out / "runs.parquet").sort(keys)
    whole = pl.read_parquet(finished[0] / "runs.parquet").sort(keys)
    assert_frame_equal(resumed.drop("seconds"), whole.drop("seconds"))


def check_that_settings_are_kept_with_the_results(finished):
    settings = json.loads((finished[0] / "settings.json").read_text())
    assert settings["steps"] == 40 and settings["learning_rates"] == {"sgd": [0.05, 0.5]}


def test_a_comparison_from_end_to_end(environment, finished, tmp_path):
    """One test, as all these checks share a training run of many seconds."""
    check_that_it_leaves_a_table_figures_and_rows(finished)
    check_that_all_schedules_of_a_seed_start_alike_and_train(finished)
    check_that_each_schedule_has_its_rates(finished)
    check_that_settings_are_kept_with_the_results(finished)
    check_that_an_interrupted_comparison_goes_on_and_ends_the_same(environment, finished, tmp_path)
    assert list(Path(environment["JAX_COMPILATION_CACHE_DIR"]).iterdir())  # what was compiled is kept


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    code = "import jax; from experiments.training.engine import configure; configure(cpus=3); "
    code += "print(jax.config.jax_compilation_cache_dir, jax.device_count())"
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert process.stdout.split() == [str(tmp_path / "greedylr_jax" / "xla"), "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "imagenet"], "unknown task 'imagenet'; there are: digits, digits-mlp"),
        (
            ["--optimizer", "adamw,lion"],
            "--optimizer must be of adamw, sgd, adagrad, adafactor, momentum, with commas, got 'lion'",
        ),
        (["--optimizer", "sgd,sgd"], "--optimizer names one twice"),
        (["--steps", "5"], "--steps must be at least 20, got 5"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["--learning-rates", "0.1,zero"],
            "--learning-rates must be positive numbers with commas, got 'zero'",
        ),
        (["--learning-rates", "0.1,-1"], "got '-1'"),
        (["--learning-rates", "inf"], "got 'inf'"),
        (["--learning-rates", ""], "got ''"),
        (["--out", "/proc/nowhere"], "cannot write"),
    ],
)
def test_a_wrong_option_ends_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "compare", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_the_tasks_and_the_studies_are_listed(monkeypatch, capsys):
    for command, expected in (
        (["tasks"], "segmentation: image segmentation, U-Net"),
        (["study", "--list"], "leaderboard: "),
    ):
        monkeypatch.setattr(sys, "argv", ["experiments", *command])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert not exit_info.value.code
        assert expected in capsys.readouterr().out
