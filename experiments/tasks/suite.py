"""The suite for rules without a learning rate: pairs of tasks of one kind, one in each half.

The development half may be trained on as often as wanted. **The held-out half is to be run once, at the
end**, when the rule and all its constants are fixed; nothing may be changed after that on account of it.

Which task of a pair is in which half was fixed before any rule was trained on either, by :func:`half_of`:
the first bit of a hash of the kind's name decides, except that a task that settings of earlier rules were
tuned on (:data:`TUNED_ON`) is a development task. Both halves have one entry of every kind.
"""

import hashlib
from typing import Literal, NamedTuple

Half = Literal["development", "held-out"]

# ``experiments.studies.initial_rate.DEVELOPMENT``, as it was when the suite was made.
TUNED_ON = frozenset(
    {
        "digits-mlp",
        "mnist1d-mlp",
        "mnist1d-residual",
        "digits-vit",
        "language-transformer",
        "language-lstm",
        "summarization",
        "segmentation",
    }
)


class Pair(NamedTuple):
    """Two tasks of a kind, trained the same way.

    Attributes:
      kind: what both are an instance of.
      tasks: their names in :data:`experiments.tasks.TASKS`.
      optimizer: the wrapped one, by its name in :data:`experiments.training.engine.OPTIMIZERS`.
      accumulation: batches whose gradients are averaged for a step of the optimizer.
    """

    kind: str
    tasks: tuple[str, str]
    optimizer: str = "adamw"
    accumulation: int = 1


class SuiteEntry(NamedTuple):
    """A task with an optimizer, in one half of the suite."""

    name: str
    task: str
    optimizer: str
    kind: str
    half: Half
    accumulation: int = 1


PAIRS = (
    # kinds of tasks
    Pair("physics-informed network", ("pinn-poisson", "pinn-burgers")),
    Pair("factorisation", ("matrix-completion", "tensor-completion")),
    Pair("outliers", ("outliers-student", "outliers-gross")),
    # one property of a perceptron
    Pair("small batch", ("digits-batch-4", "mnist1d-batch-4")),
    Pair("large batch", ("digits-batch-1024", "mnist1d-batch-1024")),
    Pair("wrong labels", ("digits-labels-40", "mnist1d-labels-30")),
    Pair("low precision", ("digits-bfloat16", "mnist1d-bfloat16")),
    Pair("narrow", ("mnist1d-width-16", "mnist1d-width-64")),
    Pair("wide", ("mnist1d-width-256", "mnist1d-width-1024")),
    Pair("shallow", ("mnist1d-depth-1", "mnist1d-depth-2")),
    Pair("medium depth", ("mnist1d-depth-3", "mnist1d-depth-4")),
    Pair("deep", ("mnist1d-depth-6", "mnist1d-depth-8")),
    Pair("unit of the parameters", ("mnist1d-parameters-1e-6", "mnist1d-parameters-1e6")),
    Pair("unit of the loss", ("mnist1d-loss-1e-6", "mnist1d-loss-1e6")),
)


def half_of(pair: Pair, index: int) -> Half:
    """The half of the task with this index, 0 or 1, in a pair."""
    tuned = [task in TUNED_ON for task in pair.tasks]
    if tuned[0] != tuned[1]:
        return "development" if tuned[index] else "held-out"
    first = hashlib.sha256(pair.kind.encode()).digest()[0] >> 7
    return "development" if index == first else "held-out"


def _entry(pair: Pair, index: int) -> SuiteEntry:
    task = pair.tasks[index]
    suffix = "" if pair.optimizer == "adamw" else f"+{pair.optimizer}"
    suffix += "" if pair.accumulation == 1 else f"+accumulate-{pair.accumulation}"
    return SuiteEntry(
        task + suffix, task, pair.optimizer, pair.kind, half_of(pair, index), pair.accumulation
    )


SUITE: dict[str, SuiteEntry] = {
    entry.name: entry for pair in PAIRS for entry in (_entry(pair, 0), _entry(pair, 1))
}


def half(name: Half) -> list[SuiteEntry]:
    """The entries of a half, in the order of :data:`PAIRS`."""
    return [entry for entry in SUITE.values() if entry.half == name]
