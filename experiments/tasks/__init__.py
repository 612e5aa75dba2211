"""Tasks by name. A task is a fixed model, data set, loss and metric, trained with different schedules."""

import functools
import importlib
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UsageError
from experiments.tasks.base import Task


class Entry(NamedTuple):
    """A registered task, built on demand."""

    summary: str  # model and data, one line
    module: str
    function: str = "make"
    arguments: tuple = ()
    has_data: bool = True

    def make(self, data_dir: Path | None) -> Task:
        """Imports the module and builds the task."""
        function = getattr(importlib.import_module(f"experiments.tasks.{self.module}"), self.function)
        return function(*self.arguments, *((data_dir,) if self.has_data else ()))


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
}


@functools.cache  # loads the data once per process
def make_task(name: str, data_dir: Path | None = None) -> Task:
    """Builds a task by its name; raises ``UsageError`` for an unknown name."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name].make(data_dir)
