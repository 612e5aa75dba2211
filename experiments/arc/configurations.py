"""The tasks whose training runs ARC is trained on: a variety of data sets, architectures and losses.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Table 1: twelve
tasks on images and text, with cross-entropy, hinge, adversarial, dice and multi-task losses. These are also
twelve, small enough to train thousands of cycles on a CPU. They share no task with ``arc evaluate``, and none
of its digits or source characters; the scenes of its detection task are used for segmentation here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.tasks import make_task
from experiments.tasks.base import CLASSIFICATION, Batch, Objective, Task, module_task
from experiments.tasks.mlp import Mlp
from experiments.tasks.segmentation import CLASSES as MASK_CLASSES
from experiments.tasks.segmentation import Stage

OPTIMIZERS: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
}
# Minimum and maximum initial rate: from too low to make progress to a rate at which some runs diverge.
RATES = {"adam": (1e-5, 3e-2), "sgd": (1e-4, 1.0), "rmsprop": (1e-5, 3e-2)}
_ATTACK = 0.1  # size of the adversarial perturbation of each input, in units of the input


class Configuration(NamedTuple):
    """A task from which training runs are sampled."""

    name: str
    make: Callable[[], Task]
    share: float = 1.0  # relative number of training runs; lower for tasks with slow steps


def _hinge(module: Any, batch: Batch) -> jax.Array:
    """The multi-class hinge loss of Crammer and Singer."""
    return jnp.mean(optax.losses.multiclass_hinge_loss(module(batch["input"]), batch["label"]))


def _squared_error(module: Any, batch: Batch) -> jax.Array:
    """Mean squared error of the outputs against one-hot labels."""
    outputs = module(batch["input"])
    return jnp.mean((outputs - jax.nn.one_hot(batch["label"], outputs.shape[-1])) ** 2)


def _adversarial(module: Any, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the batch and of its adversarial examples (fast gradient sign method)."""
    graph, state = nnx.split(module)
    loss = lambda inputs: CLASSIFICATION.loss(nnx.merge(graph, state), batch | {"input": inputs})  # noqa: E731
    perturbed = batch["input"] + _ATTACK * jnp.sign(jax.grad(loss)(batch["input"]))
    return 0.5 * (loss(batch["input"]) + loss(jax.lax.stop_gradient(perturbed)))


def _dice(module: Any, batch: Batch) -> jax.Array:
    """One minus the Dice coefficient of predicted and true masks, averaged over the classes."""
    predicted = jax.nn.softmax(module(batch["input"]), axis=-1)
    target = jax.nn.one_hot(batch["label"], MASK_CLASSES)
    intersection = jnp.sum(predicted * target, axis=(0, 1, 2))
    return 1 - jnp.mean((2 * intersection + 1) / (jnp.sum(predicted + target, axis=(0, 1, 2)) + 1))


def _contrast(module: Any, batch: Batch) -> jax.Array:
    """Contrastive loss of one-shot learning, over pairs of neighbours in the batch; margin 1."""
    embedded = module(batch["input"])
    distance = jnp.sqrt(jnp.sum((embedded - jnp.roll(embedded, 1, axis=0)) ** 2, axis=-1) + 1e-6)
    same = batch["label"] == jnp.roll(batch["label"], 1)
    return jnp.mean(jnp.where(same, distance**2, jnp.maximum(1 - distance, 0) ** 2))


class Mlp1d(Mlp):
    """The network of the task ``mnist1d-mlp``."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(40, 64, rngs=rngs)


class Convolutional1d(nnx.Module):
    """Two one-dimensional convolutions and a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(5, 16, rngs=rngs)
        self.second = nnx.Linear(5 * 16, 16, rngs=rngs)
        self.logits = nnx.Linear(7 * 16, 10, rngs=rngs)

    def __call__(self, signals: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10)."""
        hidden = nnx.relu(self.first(_windows(signals[..., None])))
        hidden = nnx.relu(self.second(_windows(hidden)))
        return self.logits(hidden.reshape(len(signals), -1))


def _windows(signals: jax.Array) -> jax.Array:
    """Patches of a convolution of width 5 and stride 2: (batch, (length - 5) // 2 + 1, 5 channels)."""
    length = (signals.shape[1] - 5) // 2 + 1
    return jnp.concatenate([signals[:, start : start + 2 * length - 1 : 2] for start in range(5)], axis=-1)


class Autoencoder(nnx.Module):
    """An autoencoder with an eight-dimensional code, and a classifier on the code."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.encode = nnx.Linear(40, 32, rngs=rngs)
        self.code = nnx.Linear(32, 8, rngs=rngs)
        self.decode = nnx.Linear(8, 40, rngs=rngs)
        self.logits = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, signals: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reconstructed signals, shape (batch, 40), and class logits, shape (batch, 10)."""
        code = nnx.relu(self.code(nnx.relu(self.encode(signals))))
        return self.decode(code), self.logits(code)


def _reconstruction(module: Autoencoder, batch: Batch) -> jax.Array:
    """Mean squared reconstruction error."""
    return jnp.mean((module(batch["input"])[0] - batch["input"]) ** 2)


def _multi_task(module: Autoencoder, batch: Batch) -> jax.Array:
    """Sum of the reconstruction error and the cross-entropy of the classes."""
    logits = module(batch["input"])[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return _reconstruction(module, batch) + jnp.mean(losses)


class Segmenter(nnx.Module):
    """Two convolutions and a classifier of each pixel, at full resolution."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stage = Stage(1, 4, rngs=rngs)
        self.logits = nnx.Linear(4, MASK_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of each pixel, shape (batch, height, width, classes)."""
        return self.logits(self.stage(images))


def _variant(
    name: str,
    base: str,
    module: Callable[..., nnx.Module],
    loss: Callable | None = None,
    *,
    share: float = 1.0,
    batch_size: int = 32,
    validated: int = 500,
) -> Configuration:
    """A task on the data of ``base``, with its own network and loss."""

    def make() -> Task:
        data = make_task(base)
        objective = CLASSIFICATION if loss is None else Objective(loss, loss, "loss")
        test = jax.tree.map(lambda rows: rows[:validated], data.test)
        return module_task(name, lambda rngs: module(rngs=rngs), objective, data.train, test, batch_size)

    return Configuration(name, make, share)


def _small(name: str, base: str, *, share: float, batch_size: int, validated: int) -> Configuration:
    """The task ``base`` with a smaller batch and a smaller validation set."""

    def make() -> Task:
        task = make_task(base)
        test = jax.tree.map(lambda rows: rows[:validated], task.test)
        return task._replace(batch_size=batch_size, test=test)

    return Configuration(name, make, share)


CONFIGURATIONS = (
    _variant("MNIST-1D, MLP, cross-entropy", "mnist1d-mlp", Mlp1d),
    _variant("MNIST-1D, CNN, cross-entropy", "mnist1d-mlp", Convolutional1d),
    _variant("MNIST-1D, CNN, hinge", "mnist1d-mlp", Convolutional1d, _hinge),
    _variant("MNIST-1D, MLP, squares", "mnist1d-mlp", Mlp1d, _squared_error),
    _variant("MNIST-1D, CNN, adversarial", "mnist1d-mlp", Convolutional1d, _adversarial),
    _variant("MNIST-1D, siamese, contrastive", "mnist1d-mlp", Mlp1d, _contrast),
    _variant("MNIST-1D, autoencoder, squares", "mnist1d-mlp", Autoencoder, _reconstruction),
    _variant("MNIST-1D, autoencoder, several tasks", "mnist1d-mlp", Autoencoder, _multi_task),
    _variant("scenes, CNN, dice", "segmentation", Segmenter, _dice, share=0.6, batch_size=4, validated=32),
    _small("scenes, U-Net, cross-entropy", "segmentation", share=0.4, batch_size=2, validated=16),
    _small("code, transformer, tagging", "tagging", share=0.6, batch_size=4, validated=50),
    _small("interface, transformer, translation", "translation-de", share=0.6, batch_size=4, validated=50),
)
