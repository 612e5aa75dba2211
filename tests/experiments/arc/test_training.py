"""Training of ARC's network: its loss, what is held out, what is hidden, and resumption."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments.arc import training as module
from experiments.arc.training import (
    Settings,
    confusion,
    hybrid_loss,
    make_epoch,
    make_samples,
    start,
)
from experiments.errors import UsageError
from greedylr_jax.arc import batch_features, load_weights

CONSOLE = Console(quiet=True)


def rows(trainings=20, rounds=3):
    """Samples whose label shows in the losses: they fall, stay or rise."""
    rng = np.random.default_rng(0)
    made = []
    for seed in range(trainings):
        for label in range(rounds):
            slope = (-1.0, 0.0, 1.0)[label]
            losses = slope * np.linspace(0, 1, 40) + 0.3 * rng.standard_normal(40)
            made.append(
                {
                    "configuration": "made", "optimizer": "sgd", "seed": seed, "round": label,
                    "train_loss": [losses.tolist()], "validation_loss": [[1.0, 2.0, 4.0]], "rates": [0.1],
                    "label": label,
                }
            )  # fmt: skip
    return pl.DataFrame(made)


def test_the_loss_is_the_average_of_both_cross_entropies():
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((50, 3)), rng.integers(0, 3, 50)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    categorical = -np.log(p[np.arange(50), labels])
    binary = -np.where(labels == 0, np.log(p[:, 0]), np.log(1 - p[:, 0]))
    got = hybrid_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(got, np.mean((categorical + binary) / 2), rtol=1e-5)
    # It stays finite where the network is sure and wrong.
    assert np.isfinite(hybrid_loss(jnp.array([[200.0, 0.0, 0.0]]), jnp.array([2])))


def test_whole_trainings_are_held_out_one_in_ten():
    # The validation losses tell which training a sample is of.
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
    with pytest.raises(UsageError, match="at least 10 trainings, got 9"):
        make_samples(rows(9))


def test_candidates_learn_and_differ():
    learned, held_out = make_samples(rows())
    epoch, candidates = make_epoch(learned, held_out, 1e-2), start(3, 1e-2)  # two devices have a place left
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
def test_a_batch_in_parts_is_a_whole_one(monkeypatch):
    learned, held_out = make_samples(rows())
    trained = []
    for most in (16, 54):
        monkeypatch.setattr(module, "_MOST", most)
        trained.append(make_epoch(learned, held_out, 1e-2)(start(2, 1e-2), 0))
    (parts, figures), (whole, expected) = trained
    np.testing.assert_allclose(figures, expected, rtol=1e-4)
    # Not the weights: Adam's first step is the sign of a gradient, which rounding turns where there is none.
    for name, gradients in whole.state[0].mu.items():
        np.testing.assert_allclose(parts.state[0].mu[name], gradients, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_validation_losses_are_hidden_from_half_of_the_samples(monkeypatch):
    seen = []

    def record(weights, features):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), jnp.all(features[..., 1] == 0, axis=-1))
        return jnp.zeros((len(features), 3)) + weights["dense_1/bias"]

    monkeypatch.setattr(module, "action_logits", record)

    learned, held_out = make_samples(rows(100))
    epoch, candidates = make_epoch(learned, held_out, 1e-3), start(2, 1e-3)
    epoch(candidates, 0)
    jax.effects_barrier()
    hidden = np.concatenate([each for each in seen if len(each) == 16])
    assert len(hidden) == 2 * 2 * 128  # candidates, steps and samples
    assert 0.4 < hidden.mean() < 0.6
    tested = [each for each in seen if len(each) == 30]
    assert tested and not np.concatenate(tested).any()


@pytest.mark.slow
def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    samples = tmp_path / "samples.parquet"
    rows().write_parquet(samples)
    settings = Settings(candidates=3, epochs=4, learning_rate=1e-3)
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
        assert all(np.array_equal(whole[key], broken[key]) for key in whole)
    assert not (tmp_path / "broken/unfinished.safetensors").exists()
    histories = pl.read_parquet(tmp_path / "broken/histories.parquet")
    assert histories.equals(pl.read_parquet(tmp_path / "whole/histories.parquet")) and len(histories) == 12
    counts = pl.read_csv(tmp_path / "broken/confusion.csv")
    assert counts["samples"].sum() == 3 * 6 and len(counts) == 27


def test_files_that_are_no_samples_are_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    for name in ("bad.parquet", "missing.parquet"):
        with pytest.raises(UsageError, match=name):
            module.train(tmp_path / name, tmp_path / "out", Settings(), CONSOLE)
    assert not (tmp_path / "out").exists()
