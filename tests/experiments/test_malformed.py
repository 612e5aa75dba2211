"""What a user can mend ends in one line that says what is wrong, exit status 2, and nothing half-written."""

import sys

import numpy as np
import pytest

from experiments.arc import commands, training
from experiments.cli import main
from experiments.errors import UsageError
from experiments.training.store import RunStore


def fails(monkeypatch, capsys, *arguments):
    """Runs the command line in this process; the error that it prints."""
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare --task nope", "unknown task 'nope'; there are: digits,"),
        ("compare --optimizer adamw,nope", "nope"),
        ("compare --steps 19", "--steps must be at least 20, got 19"),
        ("compare --steps many", "--steps"),
        ("compare --seeds 0", "--seeds must be at least 1, got 0"),
        ("compare --learning-rates 0.1,-1", "--learning-rates"),
        ("compare --learning-rates fast", "--learning-rates"),
        ("study nope", "NAME must be one of greedylr,"),
        ("study greedylr --preset big", "--preset must be one of quick, full, got 'big'"),
        ("study theory --cluster auto", "leave out --cluster"),
        ("bench nope", "NAME must be one of"),
        ("arc train --epochs 0", "--epochs must be at least 1, got 0"),
        ("arc evaluate --published nowhere.h5", "nowhere.h5"),
        ("nope", "nope"),
    ],
)
def test_a_wrong_call_says_what_is_allowed(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = fails(monkeypatch, capsys, *arguments.split())
    assert message in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    error = fails(monkeypatch, capsys, "compare", "--task", "quadratic-10", "--steps", 20, "--out", out)
    assert error == f"error: cannot write {out}/settings.json: Not a directory\n"


def test_results_of_another_preset_are_no_results_of_this_one(monkeypatch, capsys, tmp_path):
    ran = []

    def stage(name, place, left):
        def run(*arguments):
            folder = arguments[place]
            ran.append(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / left).write_text("")

        monkeypatch.setattr(commands, name, run)

    stage("generate", 2, "runs.parquet")
    stage("train", 5, "histories.parquet")
    stage("select", 2, "arc.safetensors")
    stage("evaluate", 3, "report.html")
    every = ["generate", "train", "select", "evaluate"]
    call = ("arc", "all", "--out", tmp_path, "--preset")
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, call), "tiny"])
    for expected in (every, []):  # what is finished is not done again
        ran.clear()
        with pytest.raises(SystemExit):
            main()
        assert ran == expected
    error = fails(monkeypatch, capsys, *call, "quick")
    assert error.startswith(f"error: {tmp_path} holds results that arc all --preset quick did not make")
    assert ran == [] and (tmp_path / "evaluation" / "report.html").exists()
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, call), "quick", "--fresh"])
    with pytest.raises(SystemExit):
        main()
    assert ran == every


def cut(path):
    """Leaves the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_results_that_were_cut_are_not_gone_on_with(tmp_path):
    store = RunStore(tmp_path, {"steps": 1})
    store.append([{"seed": 0}])
    store.append([{"seed": 1}])
    cut(tmp_path / "parts" / "000001.parquet")
    with pytest.raises(UsageError, match=r"cannot go on from .*000001\.parquet: .*; give --fresh to drop"):
        RunStore(tmp_path, {"steps": 1}).rows()
    with pytest.raises(UsageError, match="000001"):
        RunStore(tmp_path, {"steps": 1}).finish()
    assert not (tmp_path / "runs.parquet").exists()
    assert RunStore(tmp_path, {"steps": 1}, fresh=True).rows() is None


def test_a_checkpoint_that_was_cut_is_not_gone_on_with(tmp_path):
    arrays = {"a": np.ones(1)}
    candidates = training.Candidates(*(arrays for _ in training.Candidates._fields))
    path = tmp_path / "unfinished.safetensors"
    checkpoint = training.Checkpoint(path, {"epochs": 1}, candidates, fresh=False)
    checkpoint.write(*checkpoint.read())
    checkpoint.read()
    cut(path)
    with pytest.raises(UsageError, match=r"cannot go on from .*unfinished\.safetensors: .*--fresh"):
        checkpoint.read()


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1 cut"])
def test_samples_that_are_none_are_refused(content, monkeypatch, capsys, tmp_path):
    samples = tmp_path / "runs.parquet"
    samples.write_bytes(content)
    error = fails(monkeypatch, capsys, "arc", "train", "--samples", samples, "--out", tmp_path / "out")
    assert error.startswith(f"error: cannot read samples {samples}: make them with arc generate")
    assert not (tmp_path / "out").exists()
