"""ARC's network written out with NumPy in float64, to check the one that is compiled."""

import numpy as np


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _convolve(x, kernel, bias):
    """A cross-correlation without padding, ReLU, and the maximum of each two."""
    width = len(kernel)
    rows = [
        np.tensordot(x[i : i + width], kernel, axes=([0, 1], [0, 1])) + bias
        for i in range(len(x) - width + 1)
    ]
    rows = np.maximum(rows, 0)
    return np.array([np.maximum(rows[2 * i], rows[2 * i + 1]) for i in range(len(rows) // 2)])


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


def probabilities(weights, features):
    """Shape (3,), of features of shape (300, 3)."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = _convolve(np.asarray(features, np.float64), w["conv1d/kernel"], w["conv1d/bias"])
    x = _convolve(x, w["conv1d_1/kernel"], w["conv1d_1/bias"])
    for name in ("lstm", "lstm_1"):
        x = _lstm(x, w[f"{name}/kernel"], w[f"{name}/recurrent_kernel"], w[f"{name}/bias"])
    x = np.maximum(x[-1] @ w["dense/kernel"] + w["dense/bias"], 0)
    logits = x @ w["dense_1/kernel"] + w["dense_1/bias"]
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()
