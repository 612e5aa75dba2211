"""Usage errors print one line, exit with status 2 and write nothing."""

import sys

import numpy as np
import pytest

from experiments.arc import commands, training
from experiments.cli import main
from experiments.errors import UsageError
from experiments.training.store import RunStore


def fails(monkeypatch, capsys, *arguments):
    """Runs the command line in this process, and returns the error message."""
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
        ("study theory --cluster auto", "--cluster"),
        (
            "study theory --split held-out",
            "study theory has no option --split; it has --task and --optimizer",
        ),
        ("study initial-rate --task nope", "--task must be one or more of pinn-"),
        (
            "bench nope",
            "NAME must be one of accelerators, arc, overhead, probing, published, sweep, got 'nope'",
        ),
        ("arc train --epochs 0", "--epochs must be at least 1, got 0"),
        ("arc evaluate --published nowhere.h5", "--published must be a file, got nowhere.h5"),
        ("nope", "No such command 'nope'"),
    ],
)
def test_a_usage_error_names_the_option_and_the_allowed_values(
    arguments, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    error = fails(monkeypatch, capsys, *arguments.split())
    assert message in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    error = fails(monkeypatch, capsys, "compare", "--task", "quadratic-10", "--steps", 20, "--out", out)
    assert error == f"error: cannot write {out}/settings.json: Not a directory\n"


def test_results_of_another_preset_are_not_reused(monkeypatch, capsys, tmp_path):
    ran = []

    def stage(name, out_index, result):
        """Replaces a stage by a function that only writes its last file."""

        def run(*arguments):
            folder = arguments[out_index]
            ran.append(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / result).write_text("")

        monkeypatch.setattr(commands, name, run)

    stage("generate", 2, "runs.parquet")
    stage("train", 5, "histories.parquet")
    stage("select", 2, "arc.safetensors")
    stage("evaluate", 3, "report.html")
    every = ["generate", "train", "select", "evaluate"]
    call = ("arc", "all", "--out", tmp_path, "--preset")
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, call), "tiny"])
    for expected in (every, []):  # finished stages do not run again
        ran.clear()
        with pytest.raises(SystemExit):
            main()
        assert ran == expected
    error = fails(monkeypatch, capsys, *call, "quick")
    expected = f"error: {tmp_path} holds results of another call than arc all --preset quick; pass --fresh"
    assert error.startswith(expected)
    assert ran == [] and (tmp_path / "evaluation" / "report.html").exists()
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, call), "quick", "--fresh"])
    with pytest.raises(SystemExit):
        main()
    assert ran == every


def truncate(path):
    """Removes the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_run_store_does_not_resume_from_a_truncated_file(tmp_path):
    store = RunStore(tmp_path, {"steps": 1})
    store.append([{"seed": 0}])
    store.append([{"seed": 1}])
    truncate(tmp_path / "parts" / "000001.parquet")
    with pytest.raises(UsageError, match=r"000001\.parquet: .*--fresh"):
        RunStore(tmp_path, {"steps": 1}).rows()
    with pytest.raises(UsageError, match="000001"):
        RunStore(tmp_path, {"steps": 1}).finish()
    assert not (tmp_path / "runs.parquet").exists()
    assert RunStore(tmp_path, {"steps": 1}, fresh=True).rows() is None


def test_a_training_does_not_resume_from_a_truncated_checkpoint(tmp_path):
    arrays = {"a": np.ones(1)}
    candidates = training.Candidates(*(arrays for _ in training.Candidates._fields))
    path = tmp_path / "unfinished.safetensors"
    checkpoint = training.Checkpoint(path, {"epochs": 1}, candidates, fresh=False)
    checkpoint.write(*checkpoint.read())
    checkpoint.read()
    truncate(path)
    with pytest.raises(UsageError, match=r"unfinished\.safetensors: .*--fresh"):
        checkpoint.read()


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1 cut"])
def test_unreadable_samples_are_named_in_the_error(content, monkeypatch, capsys, tmp_path):
    samples = tmp_path / "runs.parquet"
    samples.write_bytes(content)
    error = fails(monkeypatch, capsys, "arc", "train", "--samples", samples, "--out", tmp_path / "out")
    assert error.startswith(f"error: cannot read samples from {samples}; generate them with arc generate")
    assert not (tmp_path / "out").exists()
