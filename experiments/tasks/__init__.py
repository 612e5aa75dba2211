"""Tasks by name. A task is a fixed model, data set, loss and metric; what varies is the schedule."""

import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UsageError
from experiments.tasks.base import Task
from experiments.tasks.variants import Variant


class Entry(NamedTuple):
    """A task as the command line sees it: made when it is wanted."""

    summary: str  # model and data, one line
    module: str
    function: str = "make"
    arguments: tuple = ()
    has_data: bool = True

    def make(self, data_dir: Path | None) -> Task:
        """Imports the module and makes the task."""
        function = getattr(importlib.import_module(f"experiments.tasks.{self.module}"), self.function)
        return function(*self.arguments, *((data_dir,) if self.has_data else ()))


def _perceptron(name: str, summary: str, **variant: Any) -> dict[str, Entry]:
    data = variant.get("data", "mnist1d")
    summary = f"classification, MLP, {data}, {summary}"
    return {name: Entry(summary, "variants", arguments=(name, Variant(**variant)))}


def _without_data(name: str, summary: str, module: str, function: str = "make", *arguments: Any):
    return {name: Entry(f"{summary} (no data)", module, function, (name, *arguments), has_data=False)}


# Tasks of the suite for rules without a learning rate (:mod:`experiments.tasks.suite`).
SUITE_TASKS: dict[str, Entry] = {
    **{
        name: entry
        for width in (16, 64, 256, 1024)
        for name, entry in _perceptron(f"mnist1d-width-{width}", f"width {width}", width=width).items()
    },
    **{
        name: entry
        for depth in (1, 2, 3, 4, 6, 8)
        for name, entry in _perceptron(
            f"mnist1d-depth-{depth}", f"depth {depth}", depth=depth, width=48
        ).items()
    },
    **_perceptron("digits-batch-4", "batches of 4", data="digits", batch_size=4),
    **_perceptron("mnist1d-batch-4", "batches of 4", batch_size=4),
    **_perceptron("digits-batch-1024", "batches of 1,024", data="digits", batch_size=1024),
    **_perceptron("mnist1d-batch-1024", "batches of 1,024", batch_size=1024),
    **_perceptron("digits-labels-40", "40% wrong labels", data="digits", wrong_labels=0.4),
    **_perceptron("mnist1d-labels-30", "30% wrong labels", wrong_labels=0.3),
    **_perceptron("digits-bfloat16", "bfloat16", data="digits", dtype="bfloat16"),
    **_perceptron("mnist1d-bfloat16", "bfloat16", dtype="bfloat16"),
    **_perceptron("mnist1d-parameters-1e-6", "parameters stored times 1e-6", parameter_unit=1e-6),
    **_perceptron("mnist1d-parameters-1e6", "parameters stored times 1e6", parameter_unit=1e6),
    **_perceptron("mnist1d-loss-1e-6", "loss times 1e-6", loss_unit=1e-6),
    **_perceptron("mnist1d-loss-1e6", "loss times 1e6", loss_unit=1e6),
    **_without_data("matrix-completion", "factorisation of a matrix", "factorisation", "make", (200, 150), 5, 0.3),
    **_without_data("tensor-completion", "factorisation of a tensor", "factorisation", "make", (40, 30, 25), 4, 0.3),
    **_without_data("outliers-student", "regression, MLP, Student's t noise", "outliers", "make", "student"),
    **_without_data("outliers-gross", "regression, MLP, 5% gross errors", "outliers", "make", "gross"),
    **_without_data("pinn-poisson", "physics-informed MLP, Poisson", "pinn", "make_poisson", 4.0),
    **_without_data("pinn-burgers", "physics-informed MLP, Burgers", "pinn", "make_burgers", 0.05),
}
TASKS: dict[str, Entry] = {
    "digits": Entry("image classification, CNN, 8x8 digits", "digits_cnn"),
    "digits-mlp": Entry("image classification, MLP, 8x8 digits", "mlp", "make_digits"),
    "digits-resnet": Entry("image classification, ResNet, 8x8 digits", "resnet", "make_digits"),
    "digits-vit": Entry("image classification, vision transformer, 8x8 digits", "vit", "make_digits"),
    "mnist1d-mlp": Entry("signal classification, MLP, MNIST-1D", "mlp", "make_mnist1d"),
    "mnist1d-residual": Entry(
        "signal classification, residual MLP, MNIST-1D", "mlp", "make_mnist1d_residual"
    ),
    "segmentation": Entry("image segmentation, U-Net, scenes of digits", "segmentation"),
    "detection": Entry("object detection, RetinaNet, scenes of digits", "detection"),
    "language-lstm": Entry("language modelling, LSTM, Python source", "language", "make_lstm"),
    "language-transformer": Entry(
        "language modelling, transformer, Python source", "language", "make_transformer"
    ),
    **{
        f"translation-{code}": Entry(
            f"translation, encoder-decoder transformer, interface strings, English to {language}",
            "seq2seq",
            "make_translation",
            (code,),
        )
        for code, language in (("de", "German"), ("fr", "French"), ("es", "Spanish"))
    },
    "summarization": Entry(
        "summarisation, encoder-decoder transformer, Python functions", "seq2seq", "make_summarization"
    ),
    "question-answering": Entry(
        "extractive question answering, encoder transformer, Python signatures", "question_answering"
    ),
    "tagging": Entry("tagging of tokens, encoder transformer, Python source", "tagging"),
    **{
        name: Entry(f"{kind} (no data)", "functions", arguments=(name,), has_data=False)
        for name, kind in (
            ("quadratic-10", "quadratic function, condition number 10"),
            ("quadratic-1000", "quadratic function, condition number 1000"),
            ("rosenbrock", "Rosenbrock's function"),
            ("rastrigin", "Rastrigin's function"),
            ("ackley", "Ackley's function"),
        )
    },
    **{
        f"{name}-resnet": Entry(
            f"image classification, ResNet, public set {name}", "resnet", "make_public", (name, classes)
        )
        for name, classes in (("cifar10", 10), ("cifar100", 100), ("svhn_cropped", 10))
    },
    "imdb-transformer": Entry("text classification, encoder transformer, public set imdb_reviews", "reviews"),
    **SUITE_TASKS,
}


@functools.cache  # its data are loaded once a process
def make_task(name: str, data_dir: Path | None = None) -> Task:
    """Builds a task by its name, or raises ``UsageError`` that lists the names there are."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name].make(data_dir)
