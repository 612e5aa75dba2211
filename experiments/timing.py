"""Timing on a machine with other load: variants are timed in random order and their medians compared."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved_medians(
    variants: Mapping[str, Callable[[], Any]], repetitions: int, *, warm_up: bool = True
) -> dict[str, float]:
    """The median duration of each variant in seconds; every repetition runs all variants in a random order.

    Args:
      variants: functions without arguments that return arrays.
      repetitions: of each variant, >= 1.
      warm_up: whether each variant runs once before it is timed, to exclude compilation.
    """
    order = list(variants)
    for name in order if warm_up else ():
        jax.block_until_ready(variants[name]())
    seconds: dict[str, list[float]] = {name: [] for name in order}
    generator = np.random.default_rng(0)
    for _ in range(repetitions):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(variants[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}
