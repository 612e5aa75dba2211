"""ARC's network against the same written out, and against the published weights where they are."""

from importlib import resources

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from greedylr_jax.arc import (
    ACTIONS,
    action_probabilities,
    batch_features,
    initial_weights,
    load_keras_weights,
    load_weights,
)
from greedylr_jax.arc._network import PUBLISHED, SMALL
from tests.greedylr_jax.arc import numpy_network
from tests.reference_data import reference_file


@pytest.fixture(
    scope="module",
    params=[pytest.param(PUBLISHED, marks=pytest.mark.slow, id="published"), pytest.param(SMALL, id="small")],
)
def weights(request):
    """Random weights, biases among them, larger than a fresh network's so that probabilities differ."""
    rng = np.random.default_rng(0)
    fresh = initial_weights(jax.random.key(0), request.param)
    return {name: np.asarray(array) + 0.2 * rng.standard_normal(array.shape).astype(np.float32)
            for name, array in fresh.items()}  # fmt: skip


def test_the_network_is_the_same_written_out(weights):
    features = np.random.default_rng(1).standard_normal((4, 300, 3)).astype(np.float32)
    got = action_probabilities(weights, features)
    expected = np.array([numpy_network.probabilities(weights, each) for each in features])
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(action_probabilities(weights, features[0]), expected[0], atol=1e-5)


def test_published_weights_give_the_published_probabilities():
    published = load_weights(reference_file("arc/arc_published_weights.safetensors"))
    cases = np.load(reference_file("arc/arc_forward.npz"))
    got = np.asarray(action_probabilities(published, cases["x"]))
    np.testing.assert_allclose(got, cases["probs"], atol=1e-5)
    np.testing.assert_array_equal(got.argmax(axis=1), cases["probs"].argmax(axis=1))


def test_the_published_keras_file_holds_the_same_arrays():
    pytest.importorskip("h5py")
    ours = load_keras_weights(reference_file("arc/arc_published_weights.h5"))
    theirs = load_file(reference_file("arc/arc_published_weights.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_weights_survive_a_file(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, weights[name])


def test_weights_that_do_not_fit_are_named(weights, tmp_path):
    with pytest.raises(ValueError, match=r"weights lack \['dense/bias'\]"):
        action_probabilities({k: v for k, v in weights.items() if k != "dense/bias"}, np.zeros((300, 3)))
    with pytest.raises(ValueError, match=r"unknown arrays \['more'\]"):
        action_probabilities(weights | {"more": np.zeros(1)}, np.zeros((300, 3)))
    with pytest.raises(ValueError, match=r"weights\['dense/bias'\] must have shape \((32|16),\), got \(3,\)"):
        action_probabilities(weights | {"dense/bias": np.zeros(3)}, np.zeros((300, 3)))
    with pytest.raises(ValueError, match=r"features must have shape \(..., 300, 3\), got \(3, 300\)"):
        action_probabilities(weights, np.zeros((3, 300)))
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(tmp_path / "text")
    with pytest.raises(OSError, match="nowhere"):
        load_weights(tmp_path / "nowhere")


def test_our_weights_raise_after_a_slow_start_and_lower_where_the_loss_rises():
    rng = np.random.default_rng(0)
    weights = load_weights()
    slow = batch_features([np.linspace(2.3, 2.2, 100) + 0.1 * rng.standard_normal(100)], [[2.3, 2.2]], [0.1])
    rising = [start + slope * np.linspace(0, 1, 100) for start, slope in ((1, 0), (1, 1), (2, 3))]

    rates = [0.1, 0.16, 0.26]

    def probabilities(validation):
        return np.asarray(action_probabilities(weights, batch_features(rising, validation, rates)))

    assert ACTIONS[np.argmax(action_probabilities(weights, slow))] == "raise"
    # The figures of the model card, with validation losses and without.
    np.testing.assert_allclose(probabilities([[1, 1], [1.5, 2], [3, 5]]), [0.00, 0.09, 0.91], atol=0.005)
    np.testing.assert_allclose(probabilities([[], [], []]), [0.01, 0.04, 0.95], atol=0.005)


def test_our_weights_have_a_model_card():
    card = (resources.files("greedylr_jax.arc") / "arc.md").read_text()
    metadata = safe_open(str(resources.files("greedylr_jax.arc") / "arc.safetensors"), "numpy").metadata()
    assert f"--epochs {metadata['epochs']}" in card and f"number {metadata['candidate']};" in card
    assert f"{metadata['held_out']} samples" in card
