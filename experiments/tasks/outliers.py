"""Regression by squared error where the noise of the training targets has heavy tails."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import init_mlp, mlp

_INPUTS, _HIDDEN = 8, 64


def _student(rng: np.random.Generator, count: int) -> np.ndarray:
    """Student's t with 1.5 degrees of freedom: its variance is infinite."""
    return 0.3 * rng.standard_t(1.5, count)


def _gross_errors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Small Gaussian noise, and in one target of twenty an error of ten times the signal."""
    return 0.1 * rng.normal(size=count) + np.where(rng.random(count) < 0.05, 10 * rng.normal(size=count), 0)


NOISE = {"student": _student, "gross": _gross_errors}


def make(name: str, noise: str, examples: int = 4096) -> Task:
    """A perceptron fits a function of 8 inputs; the test targets have no noise.

    Args:
      name: of the task.
      noise: of the training targets: "student" (t, 1.5 degrees of freedom) or "gross" (5% of them far off).
      examples: for training.
    """
    rng = np.random.default_rng(list(NOISE).index(noise))
    inputs = rng.normal(size=(examples + 1024, _INPUTS)).astype(np.float32)
    signal = np.sin(inputs[:, 0] * inputs[:, 1]) + np.abs(inputs[:, 2]) - np.tanh(inputs[:, 3:].sum(axis=1))
    signal = (signal - signal.mean()) / signal.std()
    noisy = signal[:examples] + NOISE[noise](rng, examples)

    def loss(params: Params, batch: Batch) -> jax.Array:
        return jnp.mean((mlp(params, batch["input"])[:, 0] - batch["label"]) ** 2)

    return Task(
        name,
        init=lambda key: init_mlp(key, (_INPUTS, _HIDDEN, _HIDDEN, 1)),
        loss=loss,
        metric=loss,
        metric_name="mean squared error",
        train={"input": inputs[:examples], "label": noisy.astype(np.float32)},
        test={"input": inputs[examples:], "label": signal[examples:].astype(np.float32)},
        batch_size=64,
        measure="loss",
    )
