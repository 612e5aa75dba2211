"""What all classification tasks share: cross-entropy, accuracy, and a Flax NNX module as a pure function."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.tasks.base import Batch, Params, Task


def make_classifier(
    name: str,
    make_module: Callable[[nnx.Rngs], nnx.Module],
    train: Batch,
    test: Batch,
    *,
    batch_size: int,
    learning_rates: Mapping[str, tuple[float, ...]],
) -> Task:
    """A task from a module and its data.

    Args:
      name: what the task is called on the command line.
      make_module: from random number streams to a module that gives logits of a batch of inputs.
      train: with the inputs under ``"input"`` and integer labels under ``"label"``.
      test: the same, held out.
      batch_size: as in :class:`Task`.
      learning_rates: as in :class:`Task`.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), nnx.Param)

    def init(key: jax.Array) -> Params:
        return nnx.state(make_module(nnx.Rngs(key)), nnx.Param)

    def logits(params: Params, batch: Batch) -> jax.Array:
        return nnx.merge(graph, params)(batch["input"])

    def loss(params: Params, batch: Batch) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["label"])
        return jnp.mean(losses)

    def accuracy(params: Params, batch: Batch) -> jax.Array:
        return jnp.mean(jnp.argmax(logits(params, batch), axis=-1) == batch["label"])

    return Task(name, init, loss, accuracy, train, test, batch_size, learning_rates)
