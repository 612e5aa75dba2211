"""The command compare from end to end on real data, at a small size, and the other commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from experiments import cli
from experiments.reporting import report, summary
from experiments.studies.compare import SCHEDULES
from experiments.training.engine import OPTIMIZERS
from experiments.training.store import RunStore
from tests.experiments.figures import assert_is_drawn, lines_of

ROOT = Path(__file__).parents[2]
SMALL = (
    "--task", "digits-mlp", "--steps", "40", "--seeds", "2", "--optimizer", "sgd",
    "--learning-rates", "0.05,0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison in a process of its own, from the root of the checkout."""
    out, cache = (tmp_path_factory.mktemp(name) for name in ("compare", "cache"))
    process = subprocess.run(
        [sys.executable, "-m", "experiments", "compare", *SMALL, "--out", str(out)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache / "programs"), "COLUMNS": "130"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert list((cache / "programs").iterdir())  # compiled programs are stored
    return out, cache, process


def run_here(monkeypatch, *arguments):
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return exit_info.value.code or 0


def check_that_it_writes_table_figures_report_and_rows(finished):
    out, cache, process = finished
    assert "sgd from 0.05" in process.stdout and "GreedyLR" in process.stdout
    lines = process.stdout.splitlines()
    assert lines[0].startswith("First run: ") and str(cache) in lines[0]
    opening = rf"{len(SCHEDULES) * 4} runs of 40 steps, \d+ at a time: about \d+ seconds, roughly."
    assert re.fullmatch(opening, lines[1])
    assert lines[-1] == f"Report: {out / 'report.html'}"
    assert "1 training programs" in process.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "histories.png", "report.html", "runs.parquet", "settings.json", "table.csv", "table.png",
    ]  # fmt: skip
    runs = pl.read_parquet(out / "runs.parquet")
    assert len(runs) == len(SCHEDULES) * 2 * 2  # rates, seeds
    assert runs["loss"].list.len().unique().to_list() == [40]
    assert_is_drawn(out / "histories.png", colors=3)
    table = summary.summarize(runs)
    texts = [
        cell.get_text().get_text()
        for cell in report.draw_table(table, "").axes[0].tables[0].get_celld().values()
    ]
    assert texts.count("GreedyLR") == 2 and f"{table['loss_100'][0]:.3g}" in texts
    page = (out / "report.html").read_text()
    call = "compare --task digits-mlp --optimizer sgd --steps 40 --seeds 2 --learning-rates 0.05,0.5"
    assert f"Command: python -m experiments {call}." in page and "sgd from 0.5" in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    sources = "Schedules and rules"
    assert headings == ["Result", "Table", "sgd from 0.05", "sgd from 0.5", sources, "Settings"]
    assert report.count_outcomes(table) in page
    assert "<tr><td>learning_rates</td><td>{&quot;sgd&quot;: [0.05, 0.5]}</td></tr>" in page


def check_that_the_histories_are_drawn(finished):
    runs = pl.read_parquet(finished[0] / "runs.parquet")
    loss_axes, rate_axes = report.draw_histories(runs, "").axes[1::2]
    assert loss_axes.get_title() == "sgd, initial rate 0.5"
    own = runs.filter(schedule="cosine", learning_rate=0.5)
    np.testing.assert_allclose(lines_of(loss_axes)["cosine"][1], np.median(own["loss"].to_list(), axis=0))
    np.testing.assert_allclose(rate_axes.lines[SCHEDULES.index("cosine")].get_ydata(), own["rate"][0])


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
    assert rates["GreedyLR"].max() > 0.5  # the loss decreases, so the rate increases


@pytest.mark.slow
def test_an_interrupted_comparison_is_resumed(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "interrupted"
    append = RunStore.append

    def append_and_interrupt(self, rows):
        append(self, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "append", append_and_interrupt)
        assert run_here(monkeypatch, "compare", *SMALL, "--out", str(out)) == 130
    assert "Run the same command again to resume." in capsys.readouterr().err
    assert not (out / "runs.parquet").exists()
    (part,) = (out / "parts").iterdir()
    assert 0 < len(pl.read_parquet(part)) < len(pl.read_parquet(finished[0] / "runs.parquet"))

    assert run_here(monkeypatch, "compare", *SMALL[:-1], "0.1", "--out", str(out)) == 2
    assert "unfinished study with other settings" in capsys.readouterr().err

    assert run_here(monkeypatch, "compare", *SMALL, "--out", str(out)) == 0
    keys = ["schedule", "learning_rate", "seed"]
    resumed = pl.read_parquet(out / "runs.parquet").sort(keys)
    whole = pl.read_parquet(finished[0] / "runs.parquet").sort(keys)
    assert_frame_equal(resumed.drop("seconds"), whole.drop("seconds"))


def check_that_settings_are_stored_with_the_results(finished):
    settings = json.loads((finished[0] / "settings.json").read_text())
    assert settings["steps"] == 40 and settings["learning_rates"] == {"sgd": [0.05, 0.5]}


def test_a_comparison_from_end_to_end(finished):
    """One test, because the checks share a process of many seconds."""
    check_that_it_writes_table_figures_report_and_rows(finished)
    check_that_the_histories_are_drawn(finished)
    check_that_all_schedules_of_a_seed_start_alike_and_train(finished)
    check_that_each_schedule_has_its_rates(finished)
    check_that_settings_are_stored_with_the_results(finished)


@pytest.mark.slow
def test_compiled_programs_are_stored_in_the_users_cache_folder(tmp_path):
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
            ["--optimizer", "adamw,newton"],
            f"--optimizer must be one or more of {', '.join(OPTIMIZERS)}, separated by commas",
        ),
        (["--optimizer", "sgd,sgd"], "--optimizer must not repeat a value, got 'sgd,sgd'"),
        (["--steps", "5"], "--steps must be at least 20, got 5"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["--learning-rates", "0.1,zero"],
            "--learning-rates must be positive numbers separated by commas, got 'zero'",
        ),
        (["--learning-rates", "0.1,-1"], "got '-1'"),
        (["--learning-rates", "inf"], "got 'inf'"),
        (["--learning-rates", ""], "got ''"),
        (["--out", "/proc/nowhere"], "cannot write"),
    ],
)
def test_the_error_for_a_wrong_option_is_one_line(arguments, message, monkeypatch, capsys):
    assert run_here(monkeypatch, "compare", *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_the_tasks_and_the_studies_are_listed(monkeypatch, capsys):
    for command, expected in (
        (["tasks"], "segmentation: image segmentation, U-Net"),
        (["study", "--list"], "leaderboard: "),
    ):
        assert run_here(monkeypatch, *command) == 0
        assert expected in capsys.readouterr().out
