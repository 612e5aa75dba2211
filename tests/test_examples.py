"""The examples run, and the training script resumes after being killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation cache for all processes of this file."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def run(environment, name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(
        command, check=True, env=environment, text=True, capture_output=True, timeout=120
    ).stdout


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", text)]


def test_validation_loss_lowers_the_rate_once_the_loss_stops_falling(environment):
    validation, scale = run(environment, "validation_loss").splitlines()
    best, at, last = numbers(validation)
    highest, final = numbers(scale)
    assert best < last and 0 < at < 1000  # it overfits
    assert highest > 1 and final < 0.1  # raised while the validation loss fell, lowered afterwards


def test_maximise_reward_finds_the_best_arm(environment):
    first, last, highest = numbers(run(environment, "maximise_reward").replace("->", ""))
    assert first < 0.7 and last > 0.95 and highest > 1


def test_own_rule_is_the_same_in_both_adapters(environment):
    lines = run(environment, "own_rule").splitlines()
    transformation, schedule = (line.split(": ")[1] for line in lines)
    assert transformation == schedule
    first, last, _, highest = numbers(schedule.replace("->", "").replace("to", ""))
    assert last < 1e-3 * first and highest > 1


STEPS, EVERY = 240, 20


def train(environment, out):
    arguments = ("--out", str(out), "--steps", str(STEPS), "--checkpoint-every", str(EVERY))
    return run(environment, "train_digits", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_a_resumed_training_equals_an_uninterrupted_one(environment, tmp_path, kills):
    """SIGKILL at random moments; each restart resumes from the last Orbax checkpoint."""
    whole = tmp_path / "whole"
    assert "test accuracy" in train(environment, whole)
    assert matplotlib.image.imread(whole / "history.png")[..., :3].std() > 0.03  # not blank
    events = b"".join(path.read_bytes() for path in (whole / "tensorboard").glob("events*"))
    assert all(events.count(name) >= STEPS for name in (b"loss", b"learning_rate", b"best_value"))
    undisturbed = np.load(whole / "result.npz")

    out = tmp_path / "killed"
    moments = random.Random(0)
    command = [sys.executable, str(ROOT / "examples" / "train_digits.py"), "--out", str(out)]
    command += ["--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
    started_at = 0
    for kill in range(kills):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        # Wait for a new checkpoint, so that the kills are spread over the run, then for a random time.
        deadline = time.monotonic() + 60
        while newest_checkpoint(out) <= started_at and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, f"finished before kill {kill}"
        started_at = newest_checkpoint(out)
    assert not (out / "result.npz").exists()

    assert f"from step {started_at}" in train(environment, out)
    resumed = np.load(out / "result.npz")
    assert sorted(resumed) == sorted(undisturbed)
    for name in undisturbed:
        np.testing.assert_array_equal(resumed[name], undisturbed[name], err_msg=name)
    rates = undisturbed["['history']['learning_rate']"]
    assert len(np.unique(rates)) > 3 and (rates > 0).all()


def newest_checkpoint(out):
    """The last step with a complete Orbax checkpoint (incomplete ones have a longer name)."""
    folder = out / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.exists() else []
    return max(steps, default=0)
