"""What a person sees first: the overview, the cache folders, the estimated duration."""

import io
import sys

import pytest
from rich.console import Console

from experiments import cli, welcome
from experiments.tasks import TASKS, make_task
from experiments.training.engine import step_flops


def test_without_a_command_an_overview_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert not exit_info.value.code
    printed = capsys.readouterr().out
    assert printed == welcome.OVERVIEW
    first = printed.index("python -m experiments compare\n")
    assert printed.index("Try first") < first < printed.index("Then:")


def test_the_commands_of_the_overview_exist():
    calls = [
        line.split("python -m experiments ")[1]
        for line in welcome.OVERVIEW.splitlines()
        if "  python" in line
    ]
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    groups = {group.name for group in cli.app.registered_groups}
    assert {call.split()[0] for call in calls} <= commands | groups
    assert "mnist1d-mlp" in TASKS and any("--task mnist1d-mlp " in call for call in calls)


def printed_by(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    console = Console(file=io.StringIO(), width=200)
    welcome.explain_first_run(console)
    return console.file.getvalue()


def test_the_first_run_names_both_cache_folders_and_later_ones_do_not(monkeypatch, tmp_path):
    printed = printed_by(monkeypatch, tmp_path)
    assert str(tmp_path / "programs") in printed and str(tmp_path / "data") in printed
    assert printed.startswith("First run: ") and printed.count("\n") == 1
    (tmp_path / "programs").mkdir()
    assert printed_by(monkeypatch, tmp_path)
    (tmp_path / "data").mkdir()
    assert printed_by(monkeypatch, tmp_path) == ""


def test_the_estimate_grows_with_the_work():
    flops = step_flops(make_task("quadratic-10"), "sgd")
    assert 10 < flops < 10_000  # ten dimensions
    settings = dict(runs=30, steps=600, devices=2, is_cached=True)
    base = welcome.estimate_seconds([1e7], **settings)
    for change in ({"runs": 60}, {"steps": 1200}, {"devices": 1}, {"is_cached": False}):
        assert welcome.estimate_seconds([1e7], **(settings | change)) > base
    assert welcome.estimate_seconds([1e7, 1e7], **settings) == 2 * base
