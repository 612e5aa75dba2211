"""Training of ARC's network: loss, held-out samples, hidden validation losses, and resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.arc import training as module
from experiments.arc.metrics import by_metric, held_out_metrics
from experiments.arc.training import (
    CandidateSettings,
    confusion,
    hybrid_loss,
    initial_candidates,
    make_epoch,
    make_samples,
)
from experiments.cli import app
from experiments.errors import UsageError
from greedylr_jax.arc import batch_features, load_weights

CONSOLE = Console(quiet=True)


def rows(trainings=20, rounds=3):
    """Samples whose label determines whether the losses fall, stay or rise."""
    rng = np.random.default_rng(0)
    samples = []
    for seed in range(trainings):
        for label in range(rounds):
            slope = (-1.0, 0.0, 1.0)[label]
            losses = slope * np.linspace(0, 1, 40) + 0.3 * rng.standard_normal(40)
            samples.append(
                {
                    "configuration": "random", "optimizer": "sgd", "seed": seed, "round": label,
                    "train_loss": [losses.tolist()], "validation_loss": [[1.0, 2.0, 4.0]], "rates": [0.1],
                    "label": label,
                }
            )  # fmt: skip
    return pl.DataFrame(samples)


def test_the_loss_is_the_average_of_both_cross_entropies():
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((50, 3)), rng.integers(0, 3, 50)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    categorical = -np.log(p[np.arange(50), labels])
    binary = -np.where(labels == 0, np.log(p[:, 0]), np.log(1 - p[:, 0]))
    got = hybrid_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(got, np.mean((categorical + binary) / 2), rtol=1e-5)
    # Finite for a confident wrong prediction.
    assert np.isfinite(hybrid_loss(jnp.array([[200.0, 0.0, 0.0]]), jnp.array([2])))


def test_every_tenth_training_run_is_held_out():
    # Every training run has its own validation losses.
    frame = rows()
    losses = pl.Series([[[0.0, seed + 1.0, 9.0]] for seed in frame["seed"]])
    frame = frame.with_columns(validation_loss=losses)
    learned, held_out = make_samples(frame)
    assert len(learned.labels) == 54 and len(held_out.labels) == 6
    expected = frame.filter((pl.col("seed") + 1) % 10 == 0)
    want = [
        batch_features(*row) for row in expected.select("train_loss", "validation_loss", "rates").iter_rows()
    ]
    np.testing.assert_array_equal(held_out.features, np.stack(want))
    np.testing.assert_array_equal(held_out.labels, expected["label"])
    with pytest.raises(UsageError, match="at least 10 training runs, got 9"):
        make_samples(rows(9))


def test_the_metrics_of_a_worthless_network_are_worthless():
    labels = np.array([0, 0, 1, 2])
    always_raise = held_out_metrics(np.tile([0.8, 0.1, 0.1], (4, 1)), labels)
    assert always_raise["accuracy"] == 0.5 and always_raise["mcc"] == 0
    np.testing.assert_allclose(always_raise["calibration_error"], 0.8 - 0.5)
    np.testing.assert_allclose(always_raise["weighted_accuracy"], (1 + 1 + 0 - 1) / 4)
    np.testing.assert_allclose(always_raise["loss"], -np.mean(np.log([0.8, 0.8, 0.1, 0.1])))
    right = held_out_metrics(np.eye(3)[labels], labels)
    assert list(right.values()) == pytest.approx([1, 1, 0, 0, 1], abs=1e-9)


def test_each_metric_selects_a_candidate():
    measured = pl.DataFrame(
        {
            "candidate": [0, 1, 2], "accuracy": [0.5, 0.7, 0.6], "mcc": [0.1, 0.2, 0.3],
            "loss": [0.1, 0.2, 0.3], "calibration_error": [0.3, 0.1, 0.2],
            "weighted_accuracy": [0.5, 0.5, 0.5],
        }
    )  # fmt: skip
    table = by_metric(measured, {0: 10.0, 1: 20.0, 2: 30.0})
    rows = {row["metric"]: row for row in table.iter_rows(named=True)}
    assert {name: row["candidate"] for name, row in rows.items()} == {
        "accuracy": 1, "mcc": 2, "loss": 0, "calibration_error": 1, "weighted_accuracy": 0, "proxy task": 2,
    }  # fmt: skip
    assert rows["mcc"]["correlation"] == pytest.approx(1) and rows["loss"]["correlation"] == pytest.approx(-1)
    assert rows["weighted_accuracy"]["correlation"] is None and rows["proxy task"]["score"] == 30


@pytest.mark.parametrize(
    ("architecture", "size"), [("small", 9315), pytest.param("published", 79043, marks=pytest.mark.slow)]
)
def test_candidates_have_the_architecture_of_their_name(architecture, size):
    candidates = initial_candidates(2, 1e-3, module.ARCHITECTURES[architecture])
    assert sum(leaf.size for leaf in jax.tree.leaves(candidates.weights)) == 2 * size


@pytest.mark.slow
def test_the_published_architecture_is_trained_by_command(tmp_path):
    samples = tmp_path / "samples.parquet"
    rows().write_parquet(samples)
    arguments = ["arc", "train", "--architecture", "published", "--candidates", "1", "--epochs", "2"]
    result = CliRunner().invoke(app, [*arguments, "--samples", str(samples), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    weights = load_weights(tmp_path / "out/candidate-00.safetensors")
    assert sum(np.size(array) for array in weights.values()) == 79043
    (measured,) = pl.read_csv(tmp_path / "out/metrics.csv").iter_rows(named=True)
    assert 0 <= measured["accuracy"] <= 1 and measured["loss"] > 0


@pytest.mark.slow
def test_candidates_learn_and_differ():
    learned, held_out = make_samples(rows())
    # Three candidates on eight devices: the last ones are padded with copies.
    epoch, candidates = make_epoch(learned, held_out, 1e-2), initial_candidates(3, 1e-2)
    history = []
    for number in range(5):
        candidates, figures = epoch(candidates, number)
        history.append(figures)
    history = np.array(history)
    assert history.shape == (5, 3, 3) and (history[:, :, 0].min(axis=0) < 0.95 * history[0, :, 0]).all()
    assert len(set(history[-1, :, 0].tolist())) == 3
    counts = confusion(jax.tree.map(lambda leaf: leaf[1], candidates.weights), held_out)
    assert counts.sum() == 6
    np.testing.assert_allclose(np.trace(counts) / 6, history[-1, 1, 2], rtol=1e-6)


@pytest.mark.slow
def test_microbatches_give_the_gradients_of_the_whole_batch(monkeypatch):
    learned, held_out = make_samples(rows())
    trained = []
    for most in (16, 54):
        monkeypatch.setattr(module, "_MAX_MICROBATCH", most)
        trained.append(make_epoch(learned, held_out, 1e-2)(initial_candidates(2, 1e-2), 0))
    (parts, figures), (whole, expected) = trained
    np.testing.assert_allclose(figures, expected, rtol=1e-4)
    # Not the weights: Adam's first step is the sign of the gradient, which is rounding noise where that is 0.
    for name, gradients in whole.state[0].mu.items():
        np.testing.assert_allclose(parts.state[0].mu[name], gradients, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_validation_losses_are_hidden_for_half_of_the_samples(monkeypatch):
    recorded = []

    def record(weights, features):
        jax.debug.callback(lambda x: recorded.append(np.asarray(x)), jnp.all(features[..., 1] == 0, axis=-1))
        return jnp.zeros((len(features), 3)) + weights["dense_1/bias"]

    monkeypatch.setattr(module, "action_logits", record)

    learned, held_out = make_samples(rows(100))
    epoch, candidates = make_epoch(learned, held_out, 1e-3), initial_candidates(2, 1e-3)
    epoch(candidates, 0)
    jax.effects_barrier()
    hidden = np.concatenate([each for each in recorded if len(each) == 16])
    assert len(hidden) == 2 * 2 * 128  # candidates, steps and samples
    assert 0.4 < hidden.mean() < 0.6
    tested = [each for each in recorded if len(each) == 30]
    assert tested and not np.concatenate(tested).any()


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    samples = tmp_path / "samples.parquet"
    rows().write_parquet(samples)
    settings = CandidateSettings(candidates=3, epochs=4, learning_rate=1e-3)
    module.train(samples, tmp_path / "whole", settings, CONSOLE)

    written = module.Checkpoint.write

    def interrupted(self, candidates, history):
        written(self, candidates, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Checkpoint, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.train(samples, tmp_path / "broken", settings, CONSOLE)
    monkeypatch.setattr(module.Checkpoint, "write", written)
    with pytest.raises(UsageError, match="other settings"):
        module.train(samples, tmp_path / "broken", settings._replace(learning_rate=1e-4), CONSOLE)
    module.train(samples, tmp_path / "broken", settings, CONSOLE)
    for number in range(3):
        name = f"candidate-{number:02d}.safetensors"
        whole, broken = (load_weights(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert whole.keys() == broken.keys() and len(whole) > 0
        assert all(np.array_equal(whole[key], broken[key]) for key in whole)
    assert not (tmp_path / "broken/unfinished.safetensors").exists()
    histories = pl.read_parquet(tmp_path / "broken/histories.parquet")
    assert histories.equals(pl.read_parquet(tmp_path / "whole/histories.parquet")) and len(histories) == 12
    counts = pl.read_csv(tmp_path / "broken/confusion.csv")
    assert counts["samples"].sum() == 3 * 6 and len(counts) == 27


def test_unreadable_samples_are_an_error(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    for name in ("bad.parquet", "missing.parquet"):
        with pytest.raises(UsageError, match=name):
            module.train(tmp_path / name, tmp_path / "out", CandidateSettings(), CONSOLE)
    assert not (tmp_path / "out").exists()
