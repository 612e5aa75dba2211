"""Timing on a noisy machine: variants run in random order, and their medians are compared."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved_medians(
    variants: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each variant, over repetitions in which the variants run in random order.

    Args:
      variants: functions without arguments; the arrays that they return are waited for.
      repeats: repetitions of each variant, >= 1.
      warm_up: run each variant once before timing, for example to compile it.
    """
    order = list(variants)
    for name in order if warm_up else ():
        jax.block_until_ready(variants[name]())
    seconds: dict[str, list[float]] = {name: [] for name in order}
    generator = np.random.default_rng(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(variants[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}
