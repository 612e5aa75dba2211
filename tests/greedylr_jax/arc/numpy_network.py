"""ARC's network written out with NumPy in float64, to check the one that is compiled."""

import numpy as np


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _convolve(x, kernel, bias, stride):
    """A cross-correlation without padding, and ReLU."""
    width = len(kernel)
    rows = [
        np.tensordot(x[i : i + width], kernel, axes=([0, 1], [0, 1])) + bias
        for i in range(0, len(x) - width + 1, stride)
    ]
    return np.maximum(rows, 0)


def _maximum_of_each(count, rows):
    return np.array([rows[start : start + count].max(axis=0) for start in range(0, len(rows), count)])


def _lstm(x, kernel, recurrent_kernel, bias):
    units = len(recurrent_kernel)
    output, cell, outputs = np.zeros(units), np.zeros(units), []
    for row in x:
        gates = row @ kernel + output @ recurrent_kernel + bias
        enter, forget, candidate, leave = (gates[i * units : (i + 1) * units] for i in range(4))
        cell = _sigmoid(forget) * cell + _sigmoid(enter) * np.tanh(candidate)
        output = _sigmoid(leave) * np.tanh(cell)
        outputs.append(output)
    return np.array(outputs)


def _two_of_each(w, x):
    """The network of the paper, up to its dense layers."""
    for name in ("conv1d", "conv1d_1"):
        x = _maximum_of_each(2, _convolve(x, w[f"{name}/kernel"], w[f"{name}/bias"], stride=1))
    for name in ("lstm", "lstm_1"):
        x = _lstm(x, w[f"{name}/kernel"], w[f"{name}/recurrent_kernel"], w[f"{name}/bias"])
    return x


def _one_of_each(w, x):
    """Ours, up to there."""
    x = _maximum_of_each(5, _convolve(x, w["conv1d/kernel"], w["conv1d/bias"], stride=4))
    return _lstm(x, w["lstm/kernel"], w["lstm/recurrent_kernel"], w["lstm/bias"])


def probabilities(weights, features):
    """Shape (3,), of features of shape (300, 3)."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    layers = _two_of_each if "lstm_1/kernel" in w else _one_of_each
    x = layers(w, np.asarray(features, np.float64))
    x = np.maximum(x[-1] @ w["dense/kernel"] + w["dense/bias"], 0)
    logits = x @ w["dense_1/kernel"] + w["dense_1/bias"]
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()
