"""The suite for rules without a learning rate: pairs of tasks of one kind, one in each half.

The development half may be trained on as often as wanted. **The held-out half is to be run once, at the
end**, when the rule and all its constants are fixed; nothing may be changed after that on account of it.

Which task of a pair is in which half was fixed before any rule was trained on either, by :func:`half_of`:
the first bit of a hash of the kind's name decides, except that a task that settings of earlier rules were
tuned on (:data:`TUNED_ON`) is a development task. Both halves have one entry of every kind, and no task is in
both.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Half = Literal["development", "held-out"]

# Tasks on which the settings of earlier rules were chosen, when the suite was made.
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
      accumulation: batches whose gradients are averaged for a step of the optimizer.
      other_optimizers: trained with besides "adamw", by their names in
        :data:`experiments.training.engine.OPTIMIZERS`; an entry of these is of the optimizer's kind.
    """

    kind: str
    tasks: tuple[str, str]
    accumulation: int = 1
    other_optimizers: tuple[str, ...] = ()


class SuiteEntry(NamedTuple):
    """A task with an optimizer, in one half of the suite."""

    name: str
    task: str
    optimizer: str
    kind: str
    half: Half
    accumulation: int = 1


PAIRS = (
    # Kinds of tasks.
    Pair("physics-informed network", ("pinn-poisson", "pinn-burgers")),
    Pair("factorisation", ("matrix-completion", "tensor-completion"), other_optimizers=("adagrad",)),
    Pair("outliers", ("outliers-student", "outliers-gross"), other_optimizers=("momentum",)),
    Pair("policy gradient", ("swing-up-reinforce", "pendulum-ppo")),
    Pair("value-based control", ("cart-pole-dqn", "pendulum-dqn")),
    Pair("graph network", ("graph-blocks", "graph-rings")),
    Pair("normalising flow", ("flow-moons", "flow-pinwheel")),
    Pair("diffusion", ("diffusion-grid", "diffusion-digits"), other_optimizers=("adam",)),
    Pair("modular arithmetic", ("modular-addition", "modular-multiplication")),
    Pair("low-rank adapters", ("digits-adapters", "mnist1d-adapters")),
    Pair("full batch", ("cancer-logistic", "wine-logistic")),
    Pair("autoencoder", ("mnist1d-autoencoder", "digits-variational"), other_optimizers=("lion",)),
    Pair("convolution", ("digits", "mnist1d-convolution"), other_optimizers=("sgd",)),
    Pair("residual network", ("digits-batch-norm", "digits-resnet")),
    Pair("recurrence", ("language-lstm", "mnist1d-recurrent")),
    Pair("attention", ("language-transformer", "tagging")),
    # Perceptrons that differ in a single respect.
    Pair("small batch", ("digits-batch-4", "mnist1d-batch-4")),
    Pair("large batch", ("digits-batch-1024", "mnist1d-batch-1024")),
    Pair("accumulation", ("digits-batch-16", "mnist1d-batch-16"), accumulation=4),
    Pair("wrong labels", ("digits-labels-40", "mnist1d-labels-30")),
    Pair("low precision", ("digits-bfloat16", "mnist1d-bfloat16")),
    Pair("narrow", ("mnist1d-width-16", "digits-width-64")),
    Pair("wide", ("mnist1d-width-256", "mnist1d-width-1024")),
    Pair("shallow", ("mnist1d-depth-1", "mnist1d-depth-2")),
    Pair("medium depth", ("mnist1d-depth-3", "mnist1d-depth-4")),
    Pair("deep", ("mnist1d-depth-6", "mnist1d-depth-8"), other_optimizers=("muon",)),
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


def _entries(pair: Pair) -> Iterator[SuiteEntry]:
    for optimizer in ("adamw", *pair.other_optimizers):
        for index, task in enumerate(pair.tasks):
            name, kind = (task, pair.kind) if optimizer == "adamw" else (f"{task}+{optimizer}", optimizer)
            yield SuiteEntry(name, task, optimizer, kind, half_of(pair, index), pair.accumulation)


SUITE: dict[str, SuiteEntry] = {entry.name: entry for pair in PAIRS for entry in _entries(pair)}


def half(name: Half) -> list[SuiteEntry]:
    """The entries of a half, in the order of :data:`PAIRS`."""
    return [entry for entry in SUITE.values() if entry.half == name]
