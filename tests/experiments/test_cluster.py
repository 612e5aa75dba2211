"""A study on a Ray cluster of two nodes: nothing is lost when a worker is killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from experiments.errors import UsageError
from experiments.training import cluster as cluster_module
from experiments.training.engine import Settings, make_specs
from experiments.training.store import RunStore
from experiments.training.sweep import Group, run_sweep

STEPS = 3000
GROUPS = [
    Group(task, "sgd", make_specs(("constant", "GreedyLR"), (0.1,), range(6)))
    for task in ("mnist1d-mlp", "digits-mlp", "quadratic-10")
]


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def workers():
    """Processes that train a group, by what Ray writes into their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::work"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_one(killed, done):
    """Waits until both nodes train, and kills one worker without a warning."""
    while not done.is_set():
        running = workers()
        if len(running) == 2:
            time.sleep(1.0)
            os.kill(running[0], signal.SIGKILL)
            killed.append(running[0])
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(address, tmp_path):
    console = Console(record=True)
    killed, done = [], threading.Event()
    killer = threading.Thread(target=kill_one, args=(killed, done))
    killer.start()
    store = RunStore(tmp_path / "cluster", {"steps": STEPS})
    try:
        run_sweep(GROUPS, Settings(STEPS), store, console, address=address)
    finally:
        done.set()
        killer.join()
    assert len(killed) == 1
    on_cluster = store.finish()

    here = RunStore(tmp_path / "here", {"steps": STEPS})
    run_sweep(GROUPS, Settings(STEPS), here, console)
    keys = ["task", "schedule", "seed"]
    expected = here.finish().sort(keys)
    got = on_cluster.sort(keys)
    assert got.select(keys).equals(expected.select(keys))
    for column in ("loss", "rate", "test_losses"):
        ours, theirs = (frame.explode(column)[column].to_numpy() for frame in (got, expected))
        assert abs(ours - theirs).max() <= 1e-4 * abs(theirs).max()

    # All is there: the same command has nothing left to train.
    again = RunStore(tmp_path / "again", {"steps": STEPS})
    again.append(on_cluster.to_dicts())
    run_sweep(GROUPS, Settings(STEPS), again, console, address=address)
    assert len(again.rows()) == len(on_cluster)


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"no Ray cluster at 'auto'.*ray start --head"):
        next(cluster_module.train_groups(GROUPS, Settings(10), "auto", None))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install \"greedylr-jax\[cluster\]\""):
        next(cluster_module.train_groups(GROUPS, Settings(10), "auto", None))
