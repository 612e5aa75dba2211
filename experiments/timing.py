"""Timing that a noisy machine does not spoil: sides take turns, and medians are compared."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved_medians(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Seconds of each side, the median of its turns; the order changes from turn to turn.

    Args:
      sides: functions without arguments that return arrays, or nothing that is still computed.
      repeats: turns of each, >= 1.
      warm_up: whether each runs once before, as the first call does what no other does.
    """
    order = list(sides)
    for name in order if warm_up else ():
        jax.block_until_ready(sides[name]())
    seconds: dict[str, list[float]] = {name: [] for name in order}
    generator = np.random.default_rng(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}
