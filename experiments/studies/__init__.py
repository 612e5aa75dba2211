"""Studies: each puts claims of one paper to the test, and leaves table, figures and rows."""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple


class Study(NamedTuple):
    """A study as the command line sees it."""

    summary: str  # one line for the list
    load: Callable[[], Callable[..., None]]  # imports it, when it is wanted


def _load(module: str) -> Callable[..., None]:
    return importlib.import_module(f"experiments.studies.{module}").run


STUDIES: dict[str, Study] = {
    name.replace("_", "-"): Study(summary, functools.partial(_load, name))
    for name, summary in (
        ("greedylr", "GreedyLR against the usual schedules: tables II to X, figures 1 to 7 of paper 000"),
        ("robustness", "nine kinds of noise on the loss, the gradients and the parameters (paper 001)"),
        ("initial_rate", "every schedule and rule from 1/1000 to 1000 times the best initial rate"),
        ("lrtuner", "LRTuner against hand-made schedules: tables 1 to 4 of paper 002"),
        ("polling", "factor polling against the usual schedules: table 1, figures 2 and 3 of paper 004"),
        ("hypergradient", "first-order GreedyLR (hypergradient descent): figures 8 to 10 of paper 000"),
        ("theory", "final loss against GreedyLR's factor where the smoothness is known (paper 001)"),
        ("leaderboard", "all rules and peers from Optax over all tasks: performance profiles"),
    )
}
