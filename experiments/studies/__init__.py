"""Studies: each puts claims of one paper to the test, and leaves table, figures and rows."""

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
    "hypergradient": Study(
        "first-order GreedyLR (hypergradient descent) beside GreedyLR: figures 8 to 10 of paper 000",
        lambda: _load("hypergradient"),
    ),
    "initial-rate": Study(
        "every schedule and rule from 1/1000 to 1000 times the best initial rate",
        lambda: _load("initial_rate"),
    ),
    "theory": Study(
        "final loss against GreedyLR's factor where the smoothness is known (paper 001)",
        lambda: _load("theory"),
    ),
}
