"""Disturbances of training: nine kinds of noise, and what of a training step they reach.

The second GreedyLR paper names the kinds; in its published code the noise is a constant that is added to the
loss before the backward pass, while the scheduler is given the clean loss, so that neither feels it. Here a
disturbance reaches what it is aimed at:

- ``observe``: the loss that a rule is given; the training itself is not touched.
- ``gradient``: the gradients.
- ``knock``: the parameters, once, at the moment when the noise is greatest.
- ``all``: all of these.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.errors import UsageError

TARGETS = ("observe", "gradient", "knock", "all")
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
    """Up for as long as it takes a patient rule to lose patience, then down again."""
    del rng
    half = _PATIENCE + 1
    return np.where(np.arange(steps) // half % 2 == 0, 1.0, -1.0)


# The noise at each step, its size about 1.
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "none": lambda rng, steps: np.zeros(steps),
    "gaussian": lambda rng, steps: rng.standard_normal(steps),
    "periodic spike": lambda rng, steps: (np.arange(1, steps + 1) % _PERIOD == 0).astype(float),
    "random spike": _spikes,
    # Constant stretches: what is added stays for a while, then jumps.
    "plateau": lambda rng, steps: np.repeat(rng.uniform(0, 1, -(-steps // _PERIOD)), _PERIOD)[:steps],
    # Not the 50 steps of GreedyLR's window, whose mean would hide it.
    "oscillatory": lambda rng, steps: np.sin(2 * np.pi * np.arange(steps) / _WAVE),
    "drift": lambda rng, steps: np.arange(1, steps + 1) / steps,
    "burst": _burst,
    "adversarial": _adversarial,
}


class Disturbance(NamedTuple):
    """The inputs of a compiled run that disturb it.

    Attributes:
      observe: added to the observed loss, in units of the loss at the start.
      gradient: the norm of what is added to the gradient, in units of its own norm.
      knock: the norm of what is added to the parameters, in units of their norm at the start.
      against: whether gradient and knock point against descent, and not in a random direction.
    """

    observe: np.ndarray  # shape=(steps,), dtype=float32
    gradient: np.ndarray  # shape=(steps,), dtype=float32
    knock: np.ndarray  # shape=(steps,), dtype=float32
    against: np.ndarray  # shape=(), dtype=bool


def name_of(kind: str, strength: float, target: str) -> str:
    """How a disturbance is written in a run's specification.

    Examples:
      >>> name_of("random spike", 0.5, "gradient")
      'random spike, 0.5, gradient'
    """
    return f"{kind}, {strength:g}, {target}"


def parse(name: str) -> tuple[str, float, str]:
    """Kind, strength and target; ``"none"`` is a disturbance of strength 0."""
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
    """The inputs of a run; the same for all schedules, optimizers and tasks."""
    kind, strength, target = parse(name)
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    noise = strength * KINDS[kind](rng, steps)
    knock = np.zeros(steps)
    moment = knock_moment(noise)
    knock[moment] = abs(noise[moment])
    silent = np.zeros(steps)
    chosen = [
        values if target in (name, "all") else silent
        for name, values in (("observe", noise), ("gradient", noise), ("knock", knock))
    ]
    return Disturbance(*(values.astype(np.float32) for values in chosen), np.asarray(kind == "adversarial"))


def knock_moment(noise: np.ndarray) -> int:
    """The step at which the noise is greatest, in the middle half of the training."""
    quarter = len(noise) // 4
    return quarter + int(np.argmax(np.abs(noise[quarter : len(noise) - quarter])))
