"""The trainings that ARC learns from: data, architectures and losses as different as small networks allow.

Paper: X. Dong et al., "To Raise or Not To Raise", Table 1: twelve tasks on images and text, with cross-entropy, hinge,
adversarial, dice and multi-task losses. Here are as many, small enough that thousands of cycles train on a CPU. The
tasks that ``evaluate`` trains are not among them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.tasks import make_task
from experiments.tasks.base import CLASSIFICATION, Batch, Objective, Task, module_task
from experiments.tasks.digits_cnn import DigitsCnn
from experiments.tasks.mlp import Mlp
from experiments.tasks.segmentation import CLASSES as MASK_CLASSES
from experiments.tasks.segmentation import Stage

OPTIMIZERS: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
}
# Decades of the initial rate: from too low to be of use to where some trainings diverge.
_RATES = {"adam": (1e-5, 3e-2), "sgd": (1e-4, 1.0), "rmsprop": (1e-5, 3e-2)}
_ATTACK = 0.1  # of the range of a pixel


class Configuration(NamedTuple):
    """A task to sample trainings of."""

    name: str
    make: Callable[[], Task]
    share: float = 1.0  # of the trainings, relative to the others'

    def rates(self, optimizer: str) -> tuple[float, float]:
        """Least and greatest initial rate."""
        return _RATES[optimizer]


def _hinge(module: Any, batch: Batch) -> jax.Array:
    """The multi-class hinge loss of Crammer and Singer."""
    return jnp.mean(optax.losses.multiclass_hinge_loss(module(batch["input"]), batch["label"]))


def _squares(module: Any, batch: Batch) -> jax.Array:
    """Squared distance of the outputs from a one in the place of the label."""
    outputs = module(batch["input"])
    return jnp.mean((outputs - jax.nn.one_hot(batch["label"], outputs.shape[-1])) ** 2)


def _adversarial(module: Any, batch: Batch) -> jax.Array:
    """Cross-entropy on the batch and on the batch moved against it (fast gradient sign)."""
    graph, state = nnx.split(module)
    loss = lambda inputs: CLASSIFICATION.loss(nnx.merge(graph, state), batch | {"input": inputs})  # noqa: E731
    moved = batch["input"] + _ATTACK * jnp.sign(jax.grad(loss)(batch["input"]))
    return 0.5 * (loss(batch["input"]) + loss(jax.lax.stop_gradient(moved)))


def _dice(module: Any, batch: Batch) -> jax.Array:
    """One minus the overlap of masks, the mean over the classes."""
    predicted = jax.nn.softmax(module(batch["input"]), axis=-1)
    target = jax.nn.one_hot(batch["label"], MASK_CLASSES)
    both = jnp.sum(predicted * target, axis=(0, 1, 2))
    return 1 - jnp.mean((2 * both + 1) / (jnp.sum(predicted + target, axis=(0, 1, 2)) + 1))


def _contrast(module: Any, batch: Batch) -> jax.Array:
    """One-shot learning: neighbours in the batch are pulled together if they are of a class, else apart."""
    embedded = module(batch["input"])
    distance = jnp.sqrt(jnp.sum((embedded - jnp.roll(embedded, 1, axis=0)) ** 2, axis=-1) + 1e-6)
    same = batch["label"] == jnp.roll(batch["label"], 1)
    return jnp.mean(jnp.where(same, distance**2, jnp.maximum(1 - distance, 0) ** 2))


class Autoencoder(nnx.Module):
    """Images through eight numbers and back."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.encode = nnx.Linear(64, 32, rngs=rngs)
        self.code = nnx.Linear(32, 8, rngs=rngs)
        self.decode = nnx.Linear(8, 64, rngs=rngs)
        self.logits = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Restored images, shape (batch, 64), and logits of their classes."""
        code = nnx.relu(self.code(nnx.relu(self.encode(images.reshape(len(images), -1)))))
        return self.decode(code), self.logits(code)


def _restore(module: Autoencoder, batch: Batch) -> jax.Array:
    return jnp.mean((module(batch["input"])[0] - batch["input"].reshape(len(batch["input"]), -1)) ** 2)


def _both(module: Autoencoder, batch: Batch) -> jax.Array:
    """Several tasks at once: restoring and classifying."""
    logits = module(batch["input"])[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return _restore(module, batch) + jnp.mean(losses)


class Convolutional1d(nnx.Module):
    """A convolution over a signal, and a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (5,), strides=2, rngs=rngs)
        self.logits = nnx.Linear(320, 10, rngs=rngs)

    def __call__(self, signals: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10)."""
        return self.logits(nnx.relu(self.conv(signals[..., None])).reshape(len(signals), -1))


class Segmenter(nnx.Module):
    """A stage of convolutions, without a way down and up."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stage = Stage(1, 4, rngs=rngs)
        self.logits = nnx.Linear(4, MASK_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of each pixel."""
        return self.logits(self.stage(images))


def _variant(base: str, name: str, module: Callable[..., nnx.Module], loss: Callable | None = None) -> Task:
    """A task on the data of another, with a network and a loss of its own."""
    data = make_task(base)
    objective = CLASSIFICATION if loss is None else Objective(loss, loss, "loss")
    return module_task(
        name, lambda rngs: module(rngs=rngs), objective, data.train, data.test, min(data.batch_size, 32)
    )


def _small(base: str, examples: int, batch_size: int) -> Task:
    """A task with fewer examples a batch, and fewer to validate on."""
    task = make_task(base)
    return task._replace(batch_size=batch_size, test=jax.tree.map(lambda rows: rows[:examples], task.test))


CONFIGURATIONS = (
    Configuration("digits, MLP, cross-entropy", lambda: make_task("digits-mlp"), 2.0),
    Configuration("digits, MLP, hinge", lambda: _variant("digits", "", _digits_mlp, _hinge), 2.0),
    Configuration("digits, MLP, squares", lambda: _variant("digits", "", _digits_mlp, _squares), 2.0),
    Configuration("digits, CNN, adversarial", lambda: _variant("digits", "", DigitsCnn, _adversarial), 0.5),
    Configuration("digits, siamese", lambda: _variant("digits", "", _digits_mlp, _contrast), 2.0),
    Configuration("digits, autoencoder", lambda: _variant("digits", "", Autoencoder, _restore), 2.0),
    Configuration("digits, several tasks", lambda: _variant("digits", "", Autoencoder, _both), 2.0),
    Configuration("MNIST-1D, MLP, cross-entropy", lambda: make_task("mnist1d-mlp"), 2.0),
    Configuration("MNIST-1D, CNN, cross-entropy", lambda: _variant("mnist1d-mlp", "", Convolutional1d), 2.0),
    Configuration("scenes, CNN, dice", lambda: _variant("segmentation", "", Segmenter, _dice), 0.2),
    Configuration("code, tagging", lambda: _small("tagging", 100, 4), 0.3),
    Configuration("interface, translation", lambda: _small("translation-de", 50, 4), 0.3),
)


def _digits_mlp(*, rngs: nnx.Rngs) -> Mlp:
    return Mlp(64, 32, rngs=rngs)
