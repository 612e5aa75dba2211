"""Studies: each puts claims of one paper to the test, and leaves table, figures and rows."""

from collections.abc import Callable
from typing import NamedTuple


class Study(NamedTuple):
    """A study as the command line sees it."""

    summary: str  # one line for the list
    load: Callable[[], Callable[..., None]]  # imports it, when it is wanted


def _hypergradient() -> Callable[..., None]:
    from experiments.studies import hypergradient  # noqa: PLC0415  (imports JAX)

    return hypergradient.run


def _initial_rate() -> Callable[..., None]:
    from experiments.studies import initial_rate  # noqa: PLC0415

    return initial_rate.run


STUDIES: dict[str, Study] = {
    "hypergradient": Study(
        "first-order GreedyLR (hypergradient descent) beside GreedyLR: figures 8 to 10 of paper 000",
        _hypergradient,
    ),
    "initial-rate": Study(
        "every schedule and rule from 1/1000 to 1000 times the best initial rate", _initial_rate
    ),
}
