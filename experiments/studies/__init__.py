"""Studies of the claims of papers and comparisons of all rules.

Each writes rows, tables, figures and a report.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from experiments.errors import UsageError

if TYPE_CHECKING:
    from experiments.studies.base import Selection


class Study(NamedTuple):
    """The command line's entry for a study."""

    summary: str  # one line for the list
    load: Callable[[], Callable[..., None]]  # imports the study and returns its function


def _load(module: str) -> Callable[..., None]:
    return importlib.import_module(f"experiments.studies.{module}").run


STUDIES: dict[str, Study] = {
    name.replace("_", "-"): Study(summary, functools.partial(_load, name))
    for name, summary in (
        ("greedylr", "GreedyLR against common schedules: tables II to X, figures 1 to 7 of its paper"),
        ("robustness", "eight kinds of noise on losses, gradients and parameters (second GreedyLR paper)"),
        ("initial_rate", "rules without a learning rate, and defaults, against cosine at its best rate"),
        ("rate_sensitivity", "every schedule and rule from 1/1000 to 1000 times the best initial rate"),
        ("lrtuner", "LRTuner against hand-tuned schedules: tables 1 to 4 of the LRTuner paper (Iyer et al.)"),
        ("polling", "factor polling against common schedules: table 1, figures 2 and 3 of Kim and Yu"),
        ("polling_ablation", "cadence, sharpness, normalization and score of factor polling (Kim and Yu)"),
        (
            "hypergradient",
            "first-order GreedyLR (hypergradient descent): figures 8 to 10 of the GreedyLR paper",
        ),
        (
            "theory",
            "final loss by GreedyLR's factor for functions of known smoothness (second GreedyLR paper)",
        ),
        ("finetune", "GreedyLR in pre-training and fine-tuning, full or adapters (second GreedyLR paper)"),
        ("leaderboard", "all rules and baselines from Optax on all tasks: performance profiles"),
    )
}
OVER_THE_SUITE = "initial-rate"  # the study of the entries of the suite, each of which has its optimizer


def check_options(study: str, selection: "Selection") -> None:
    """Raises ``UsageError`` if a study has no such option."""
    given = {name for name, value in selection._asdict().items() if value is not None}
    if study == OVER_THE_SUITE:
        wrong, allowed = given & {"optimizer"}, "--task, --split, --rule and --steps"
    else:
        wrong, allowed = given - {"task", "optimizer"}, "--task and --optimizer"
    if wrong:
        options = ", ".join(f"--{name}" for name in sorted(wrong))
        raise UsageError(f"study {study} has no option {options}; it has {allowed}")
