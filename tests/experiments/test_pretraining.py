"""Pretraining: files of weights, resumed trainings, masked words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from rich.console import Console

from experiments import pretraining
from experiments.errors import UsageError
from experiments.tasks import make_task
from experiments.tasks.base import CLASSIFICATION, Collector
from experiments.tasks.named import make_network, network_task, with_wrong_labels
from experiments.tasks.pretraining import SIZES, _windows, mask_words

CONSOLE = Console(quiet=True)


def small_task(kind="image", preset="tiny", name=None, data_dir=None):
    """Logistic regression whose collector draws noise, as that of masked language modelling."""
    rng = np.random.default_rng(0)
    examples = {
        "input": rng.standard_normal((64, 5)).astype(np.float32),
        "label": rng.integers(0, 3, 64).astype(np.int32),
    }

    def collect(key, params, batch):
        key, own = jax.random.split(key)
        return key, batch | {"input": batch["input"] + 0.1 * jax.random.normal(own, batch["input"].shape)}

    return network_task(
        "small",
        make_network(lambda rngs: nnx.Linear(5, 3, rngs=rngs)),
        CLASSIFICATION,
        examples,
        examples,
        8,
        collector=Collector(lambda key, params: key, collect),
    )


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretraining, "KINDS", ("image",))
    monkeypatch.setattr(pretraining, "CHUNK", 5)  # of 20 steps
    monkeypatch.setattr(pretraining, "make_task", small_task)
    return tmp_path


def test_a_resumed_training_ends_with_the_same_weights(small, monkeypatch):
    pretraining.pretrain("tiny", CONSOLE)
    path = pretraining.weights_path("image", "tiny")
    assert path.parent == small / "greedylr_jax" / "pretrained"
    whole = pretraining.load("image", "tiny")
    assert len(whole.losses) == 4 and np.isfinite(whole.losses).all() and 0 <= whole.metric <= 1
    path.unlink()

    save, saved = pretraining._save, []

    def interrupted(path, state, losses):
        save(path, state, losses)
        saved.append(losses[-1])
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "_save", interrupted)
        pretraining.pretrain("tiny", CONSOLE)
    assert not path.exists() and pretraining._unfinished(path).exists()
    monkeypatch.setattr(pretraining, "_save", lambda *args: saved.append(args[-1][-1]) or save(*args))
    pretraining.pretrain("tiny", CONSOLE)
    assert saved == whole.losses  # no chunk twice
    resumed = pretraining.load("image", "tiny")
    assert resumed.losses == whole.losses and resumed.metric == whole.metric
    assert resumed.arrays.keys() == whole.arrays.keys() == {"kernel", "bias"}
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_finished_weights_are_not_trained_again_unless_fresh(small, monkeypatch):
    pretraining.pretrain("tiny", CONSOLE)
    before = pretraining.weights_path("image", "tiny").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_train", lambda *args: pytest.fail("trained again"))
        pretraining.pretrain("tiny", CONSOLE)
    pretraining.pretrain("tiny", CONSOLE, fresh=True)
    assert pretraining.weights_path("image", "tiny").stat().st_mtime_ns > before


def test_a_damaged_unfinished_training_is_named(small):
    path = pretraining._unfinished(pretraining.weights_path("image", "tiny"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"truncated")
    with pytest.raises(UsageError, match=r"cannot resume from .*unfinished.*--fresh"):
        pretraining.pretrain("tiny", CONSOLE)


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="python -m experiments pretrain --preset quick"):
        make_task("digits-finetuned")


def test_the_name_of_a_file_depends_on_data_preset_settings_and_code(monkeypatch):
    path = pretraining.weights_path
    names = {path(kind, preset).name for kind in pretraining.KINDS for preset in SIZES}
    assert len(names) == 9
    before = path("encoder", "quick"), path("image", "quick")
    with monkeypatch.context() as patch:
        patch.setitem(SIZES, "quick", SIZES["quick"]._replace(width=56))
        assert path("encoder", "quick") != before[0] and path("image", "quick") == before[1]
    with monkeypatch.context() as patch:
        patch.setattr(pretraining.StdlibText, "VERSION", "1.0.1")
        assert path("encoder", "quick") != before[0] and path("image", "quick") == before[1]
    monkeypatch.setattr(pretraining, "_VERSION", 2)
    assert path("encoder", "quick") != before[0] and path("image", "quick") != before[1]


def test_fifteen_percent_of_the_words_are_masked():
    windows = np.random.default_rng(0).integers(4, 100, (200, 40)).astype(np.int32)
    masked = jax.device_get(jax.jit(mask_words, static_argnums=2)(jax.random.key(0), windows, 100))
    assert masked["positions"].shape == (200, 6)
    assert all(len(set(row)) == 6 for row in masked["positions"])
    np.testing.assert_array_equal(masked["label"], np.take_along_axis(windows, masked["positions"], axis=1))
    changed = masked["input"] != windows
    at = np.zeros_like(changed)
    np.put_along_axis(at, masked["positions"], True, axis=1)
    assert not changed[~at].any()
    shown = np.take_along_axis(masked["input"], masked["positions"], axis=1)
    assert 0.77 < (shown == 100).mean() < 0.83  # 0.8
    assert 0.07 < (shown == masked["label"]).mean() < 0.13  # 0.1 and a few random ones
    assert shown.min() >= 4


def test_consecutive_windows_share_a_word():
    np.testing.assert_array_equal(_windows(list(range(10)), 3), [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
    np.testing.assert_array_equal(_windows(list(range(9)), 3), [[0, 1, 2, 3], [3, 4, 5, 6]])


def test_labels_are_wrong_in_five_batches_only():
    task = with_wrong_labels(small_task(), 2)
    source, batch = (
        task.collector.init(jax.random.key(0), None),
        {"input": jnp.ones((3, 5)), "label": jnp.arange(3)},
    )
    for step in range(9):
        source, got = task.collector.collect(source, None, batch)
        expected = [2, 0, 1] if 2 <= step < 7 else [0, 1, 2]
        np.testing.assert_array_equal(got["label"], expected)
        assert got["input"].shape == (3, 5)


def test_wrong_labels_are_part_of_the_name_of_a_task():
    task = make_task("quadratic-10+wrong-labels-at-7")
    assert task.name == "quadratic-10+wrong-labels-at-7"
    with pytest.raises(UsageError, match="unknown task"):
        make_task("quadratic-10+wrong-labels-at-x")


def test_metadata_describes_the_weights(small):
    pretraining.pretrain("tiny", CONSOLE)
    with safetensors.safe_open(pretraining.weights_path("image", "tiny"), "numpy") as file:
        described = json.loads(file.metadata()["described"])
    assert described == json.loads(json.dumps(pretraining.describe("image", "tiny")))
    assert described["data"].startswith("digits/") and described["size"]["channels"] == 4


def test_only_the_networks_that_tasks_need_are_trained(monkeypatch):
    called = []
    monkeypatch.setattr(
        pretraining, "pretrain", lambda preset, console, kinds: called.append((preset, kinds))
    )
    tasks = ("digits", "docstrings-lora-full", "digits-scratch-full", "tagging-finetuned", "tagging-lora")
    pretraining.pretrain_for(tasks, CONSOLE)
    assert called == [("full", ["decoder", "image"]), ("quick", ["encoder"])]
