"""Training on a Ray cluster of two nodes: no run is missing after a worker is killed."""

import os
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from ray._private.runtime_env import packaging
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
def address(monkeypatch, tmp_path):
    # The workers have no other source of the packages than the driver.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def workers():
    """The ids of processes that train a group, by the command lines that Ray sets."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::work"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_one(killed, done):
    """Waits until both nodes train, and kills one worker."""
    while not done.is_set():
        running = workers()
        if len(running) == 2:
            time.sleep(1.0)
            os.kill(running[0], signal.SIGKILL)
            killed.append(running[0])
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_no_run_is_missing_after_a_worker_is_killed(address, tmp_path):
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
        a, b = (frame.explode(column)[column].to_numpy() for frame in (got, expected))
        assert abs(a - b).max() <= 1e-4 * abs(b).max()

    # With all runs in the store nothing is trained.
    again = RunStore(tmp_path / "again", {"steps": STEPS})
    again.append(on_cluster.to_dicts())
    run_sweep(GROUPS, Settings(STEPS), again, console, address=address)
    assert len(again.rows()) == len(on_cluster)


def locate(group, settings):
    """Trains nothing: the files of the packages on the worker, and the rows of a data file."""
    import experiments  # noqa: PLC0415  (that of the worker)
    import greedylr_jax  # noqa: PLC0415
    from experiments.studies.base import read_published  # noqa: PLC0415

    yield [
        {"files": [experiments.__file__, greedylr_jax.__file__], "rows": len(read_published("arc_tables"))}
    ]


@pytest.mark.slow
def test_workers_run_the_code_of_the_checkout(address):
    # By value, because this module is not among the packages that are sent.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ((row,),) = cluster_module.train_groups(["group"], None, address, locate)
    assert all("py_modules_files" in file for file in row["files"]) and row["rows"] == 24


def test_the_packages_of_the_checkout_are_sent_to_the_workers(tmp_path):
    environment = cluster_module.runtime_env()
    names = []
    for module in environment["py_modules"]:
        package = tmp_path / f"{Path(module).name}.zip"
        packaging.create_package(module, package, True, True, environment["excludes"])
        names += zipfile.ZipFile(package).namelist()
    files = {name for name in names if not name.endswith("/")}
    assert {"experiments/__main__.py", "experiments/studies/published/arc_tables.csv"} <= files
    assert {"greedylr_jax/__init__.py", "greedylr_jax/arc/arc.safetensors"} <= files
    assert not [name for name in files if "__pycache__" in name or "results" in name]


def test_the_error_for_a_missing_cluster_names_its_address():
    with pytest.raises(UsageError, match=r"no Ray cluster at 'auto'.*ray start --head"):
        next(cluster_module.train_groups(GROUPS, Settings(10), "auto", None))


def test_the_error_without_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install \"greedylr-jax\[cluster\]\""):
        next(cluster_module.train_groups(GROUPS, Settings(10), "auto", None))
