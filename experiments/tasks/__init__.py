"""Tasks by name. A task is a fixed model, data set, loss and metric, trained with different schedules."""

import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UsageError
from experiments.tasks.base import Task
from experiments.tasks.named import with_wrong_labels
from experiments.tasks.variants import Variant


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


def _perceptron(name: str, summary: str, **variant: Any) -> tuple[str, Entry]:
    """A classifier that differs from others in a single respect, see :mod:`experiments.tasks.variants`."""
    data = variant.get("data", "mnist1d")
    summary = f"classification, MLP, {data}, {summary}"
    return name, Entry(summary, "variants", arguments=(name, Variant(**variant)))


def _named(
    name: str, summary: str, module: str, function: str = "make", *arguments: Any
) -> tuple[str, Entry]:
    """A task whose maker takes its name first."""
    return name, Entry(summary, module, function, (name, *arguments))


def _made(name: str, summary: str, module: str, function: str = "make", *arguments: Any) -> tuple[str, Entry]:
    """The same, without a data set."""
    return name, Entry(f"{summary} (no data set)", module, function, (name, *arguments), has_data=False)


# Tasks that were made for the suite of rules without a learning rate (:mod:`experiments.tasks.suite`).
SUITE_TASKS: dict[str, Entry] = dict(
    [
        *(_perceptron(f"mnist1d-width-{width}", f"width {width}", width=width) for width in (16, 256, 1024)),
        _perceptron("digits-width-64", "width 64", data="digits", width=64),
        *(
            _perceptron(f"mnist1d-depth-{depth}", f"depth {depth}", depth=depth, width=48)
            for depth in (1, 2, 3, 4, 6, 8)
        ),
        *(
            _perceptron(f"{data}-batch-{size}", f"batches of {size}", data=data, batch_size=size)
            for size in (4, 16, 1024)
            for data in ("digits", "mnist1d")
        ),
        _perceptron("digits-labels-40", "40% wrong labels", data="digits", wrong_labels=0.4),
        _perceptron("mnist1d-labels-30", "30% wrong labels", wrong_labels=0.3),
        _perceptron("digits-bfloat16", "bfloat16", data="digits", dtype="bfloat16"),
        _perceptron("mnist1d-bfloat16", "bfloat16", dtype="bfloat16"),
        *(
            _perceptron(f"mnist1d-parameters-{unit}", f"parameters times {unit}", parameter_unit=float(unit))
            for unit in ("1e-6", "1e6")
        ),
        *(
            _perceptron(f"mnist1d-loss-{unit}", f"loss times {unit}", loss_unit=float(unit))
            for unit in ("1e-6", "1e6")
        ),
        _made("matrix-completion", "matrix factorisation", "factorisation", "make", (200, 150), 5, 0.3),
        _made("tensor-completion", "tensor factorisation", "factorisation", "make", (40, 30, 25), 4, 0.3),
        _made("outliers-student", "regression, MLP, Student's t noise", "outliers", "make", "student"),
        _made("outliers-gross", "regression, MLP, 5% gross errors", "outliers", "make", "gross"),
        _made("pinn-poisson", "physics-informed MLP, Poisson", "pinn", "make_poisson", 4.0),
        _made("pinn-burgers", "physics-informed MLP, Burgers", "pinn", "make_burgers", 0.05),
        _made(
            "swing-up-reinforce",
            "cart-pole swing-up, REINFORCE",
            "reinforcement",
            "make_reinforce",
            "swing-up",
        ),
        _made("pendulum-ppo", "pendulum, PPO", "reinforcement", "make_ppo", "pendulum"),
        _made("cart-pole-dqn", "cart-pole, DQN", "reinforcement", "make_dqn", "cart-pole"),
        _made("pendulum-dqn", "pendulum, DQN", "reinforcement", "make_dqn", "pendulum"),
        _made("graph-blocks", "graph network, block model", "graphs", "make", "blocks"),
        _made("graph-rings", "graph network, rewired ring", "graphs", "make", "rings"),
        _made("flow-moons", "normalising flow, two moons", "densities", "make_flow", "moons"),
        _made("flow-pinwheel", "normalising flow, pinwheel", "densities", "make_flow", "pinwheel"),
        _made("diffusion-grid", "diffusion, nine Gaussians", "densities", "make_diffusion_points", "grid"),
        _named("diffusion-digits", "diffusion, 8x8 digits", "densities", "make_diffusion_digits"),
        _made("modular-addition", "modular addition, MLP", "modular", "make", "addition", 31, 0.7),
        _made("modular-multiplication", "modular product, MLP", "modular", "make", "multiplication", 31, 0.7),
        _named("digits-adapters", "low-rank adapters, digits", "adapters", "make", "digits"),
        _named("mnist1d-adapters", "low-rank adapters, MNIST-1D", "adapters", "make", "mnist1d"),
        _made("cancer-logistic", "logistic regression, full batch", "full_batch", "make", "cancer"),
        _made("wine-logistic", "logistic regression, full batch", "full_batch", "make", "wine"),
        _named("mnist1d-autoencoder", "autoencoder, MNIST-1D", "autoencoders", "make_plain", "mnist1d"),
        _named("digits-variational", "variational autoencoder", "autoencoders", "make_variational", "digits"),
        _named("mnist1d-convolution", "signal classification, convolutions", "signals", "make_convolution"),
        _named("mnist1d-recurrent", "signal classification, GRU", "signals", "make_recurrent"),
        _named("digits-batch-norm", "image classification, ResNet, batch normalisation", "batch_norm"),
    ]
)
_FINE_TUNED = {
    "tagging": "tagging of tokens, encoder transformer",
    "question-answering": "extractive question answering, encoder transformer",
    "summarization": "summarisation, encoder-decoder transformer",
    "translation-fr": "translation to French, encoder-decoder transformer",
    "docstrings": "docstring generation, decoder transformer",
    "digits": "image classification, ResNet, digits 5 to 9",
}
_METHODS = {
    "finetuned": "all parameters from pretrained ones",
    "lora": "low-rank adapters of a pretrained network",
    "scratch": "the same network without pretraining",
}
# Fine-tuning and pretraining; the networks of the preset full have this suffix.
_SIZES = {"quick": "", "full": "-full"}
FINE_TUNING_TASKS: dict[str, Entry] = dict(
    _named(
        f"{kind}-{method}{suffix}", f"{task}, {start} ({preset})", "finetuning", "make", kind, method, preset
    )
    for preset, suffix in _SIZES.items()
    for kind, task in _FINE_TUNED.items()
    for method, start in _METHODS.items()
)
PRETRAINING_TASKS: dict[str, Entry] = dict(
    _named(f"pretraining-{kind}{suffix}", f"{task} ({preset})", "pretraining", "make", kind, preset)
    for preset, suffix in _SIZES.items()
    for kind, task in (
        ("encoder", "masked language modelling, encoder transformer, Python source"),
        ("decoder", "causal language modelling, decoder transformer, Python source"),
        ("image", "image classification, ResNet, digits 0 to 4"),
    )
)
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
    **{
        f"{data}-resnet18": Entry(
            f"image classification, ResNet-18, public set {data}",
            "resnet18",
            arguments=(f"{data}-resnet18", data, classes, 128),
        )
        for data, classes in (("cifar10", 10), ("cifar100", 100))
    },
    "imdb-transformer": Entry("text classification, encoder transformer, public set imdb_reviews", "reviews"),
    **PRETRAINING_TASKS,
    **FINE_TUNING_TASKS,
    **SUITE_TASKS,
}
_WRONG = "+wrong-labels-at-"


@functools.cache  # loads the data once per process
def make_task(name: str, data_dir: Path | None = None) -> Task:
    """Builds a task by its name; raises ``UsageError`` for an unknown name.

    ``NAME+wrong-labels-at-STEP`` is a task whose labels are wrong in five batches from a step on.
    """
    plain, mark, step = name.partition(_WRONG)
    if mark and step.isdigit():
        return with_wrong_labels(make_task(plain, data_dir), int(step))._replace(name=name)
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name].make(data_dir)
