"""Disturbances of training: eight kinds of noise, and the quantities of a training step that they change.

The second GreedyLR paper names the kinds. In its published code the noise is a constant that is added to the
loss before the backward pass, while the scheduler is given the clean loss, so it affects neither. Here a
disturbance has one of these targets:

- ``observe``: the loss that a rule is given; gradients and parameters are unchanged.
- ``gradient``: the gradients. The norm of the noise does not fall with that of the gradient: noise in
  proportion to the current gradient vanishes at the minimum, and hardly changes where a training ends.
- ``parameters``: the parameters, once, at the step with the maximum noise (a parameter perturbation).
- ``all``: all of these.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.errors import UsageError

TARGETS = ("observe", "gradient", "parameters", "all")
_PERIOD, _WAVE, _BURST = 50, 30, 20  # steps
_PATIENCE = 10  # of GreedyLR's published settings


def _spikes(rng: np.random.Generator, steps: int) -> np.ndarray:
    noise = np.zeros(steps)
    noise[rng.choice(steps, max(1, steps // _PERIOD), replace=False)] = 1
    return noise


def _burst(rng: np.random.Generator, steps: int) -> np.ndarray:
    noise = np.zeros(steps)
    for start in rng.choice(steps, max(1, steps // 200), replace=False):
        noise[start : start + _BURST] = rng.standard_normal(len(noise[start : start + _BURST]))
    return noise


def _adversarial(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Alternates between 1 and -1, each for one step more than the patience of GreedyLR."""
    del rng
    half = _PATIENCE + 1
    return np.where(np.arange(steps) // half % 2 == 0, 1.0, -1.0)


# From a random generator and the number of steps to the noise at each step, of magnitude about 1.
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "none": lambda rng, steps: np.zeros(steps),
    "gaussian": lambda rng, steps: rng.standard_normal(steps),
    "periodic spike": lambda rng, steps: (np.arange(1, steps + 1) % _PERIOD == 0).astype(float),
    "random spike": _spikes,
    # Piecewise constant.
    "plateau": lambda rng, steps: np.repeat(rng.uniform(0, 1, -(-steps // _PERIOD)), _PERIOD)[:steps],
    # The period is not the 50 steps of GreedyLR's window, over which the mean of the noise would be 0.
    "oscillatory": lambda rng, steps: np.sin(2 * np.pi * np.arange(steps) / _WAVE),
    "drift": lambda rng, steps: np.arange(1, steps + 1) / steps,
    "burst": _burst,
    "adversarial": _adversarial,
}


class Disturbance(NamedTuple):
    """The inputs of a compiled run that disturb it.

    Attributes:
      observe: added to the observed loss, in units of the initial loss.
      gradient: norm of the noise added to the gradient, in units of the norm of the run's first gradient.
      parameters: norm of the perturbation of the parameters, in units of their initial norm.
      ascent: whether both are directed against descent instead of in a random direction.
    """

    observe: np.ndarray  # shape=(steps,), dtype=float32
    gradient: np.ndarray  # shape=(steps,), dtype=float32
    parameters: np.ndarray  # shape=(steps,), dtype=float32
    ascent: np.ndarray  # shape=(), dtype=bool


def name_of(kind: str, strength: float, target: str) -> str:
    """The name of a disturbance in a run's specification.

    Examples:
      >>> name_of("random spike", 0.5, "gradient")
      'random spike, 0.5, gradient'
    """
    return f"{kind}, {strength:g}, {target}"


def parse(name: str) -> tuple[str, float, str]:
    """The kind, strength and target of a name; ``"none"`` is a disturbance of strength 0.

    Raises:
      UsageError: if it is not the name of a disturbance.
    """
    if name == "none":
        return "none", 0.0, "all"
    try:
        kind, strength, target = name.split(", ")
        if kind not in KINDS or target not in TARGETS:
            raise ValueError
        return kind, float(strength), target
    except ValueError as error:
        raise UsageError(
            f"unknown disturbance {name!r}; it must be 'kind, strength, target' with a kind of "
            f"{', '.join(KINDS)} and a target of {', '.join(TARGETS)}"
        ) from error


def disturbance_inputs(name: str, steps: int, seed: int) -> Disturbance:
    """The inputs of a run with a seed; equal for all schedules, optimizers and tasks."""
    kind, strength, target = parse(name)
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    noise = strength * KINDS[kind](rng, steps)
    perturbation = np.zeros(steps)
    at = perturbation_step(noise)
    perturbation[at] = abs(noise[at])
    zero = np.zeros(steps)
    chosen = [
        values if target in (name, "all") else zero
        for name, values in (("observe", noise), ("gradient", noise), ("parameters", perturbation))
    ]
    return Disturbance(*(values.astype(np.float32) for values in chosen), np.asarray(kind == "adversarial"))


def perturbation_step(noise: np.ndarray) -> int:
    """The step with the maximum absolute noise in the middle half of training."""
    quarter = len(noise) // 4
    return quarter + int(np.argmax(np.abs(noise[quarter : len(noise) - quarter])))
