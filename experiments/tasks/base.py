"""The type of a task, and its construction from a Flax NNX module and data."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

Params = Any
Batch = dict[str, jax.Array]
# Default initial rates: too low, suitable, too high.
LEARNING_RATES: Mapping[str, tuple[float, ...]] = {
    "adamw": (1e-4, 1e-3, 1e-2),
    "sgd": (1e-2, 1e-1, 1.0),
    "adagrad": (1e-3, 1e-2, 1e-1),
    "adafactor": (1e-4, 1e-3, 1e-2),
    "momentum": (1e-3, 1e-2, 1e-1),
    "momentum-decay": (1e-3, 1e-2, 1e-1),
    "adam": (1e-4, 1e-3, 1e-2),
    "lion": (1e-5, 1e-4, 1e-3),
    "muon": (1e-3, 1e-2, 1e-1),
}


class Collector(NamedTuple):
    """Makes the batch of each step from a state and the current parameters, as in reinforcement learning.

    The state (environments, a replay buffer, a target network) is not differentiated.

    Attributes:
      init: from a key and the initial parameters to the state.
      collect: from the state, the current parameters and the batch of training examples to the next state and
        the batch that the loss is computed on.
    """

    init: Callable[[jax.Array, Params], Any]
    collect: Callable[[Any, Params, Batch], tuple[Any, Batch]]


# A step's batch is the drawn training examples.
DRAWN = Collector(lambda key, params: (), lambda state, params, batch: (state, batch))


class TextScore(NamedTuple):
    """A score of predicted text, computed after training because it is not a function of arrays alone.

    Attributes:
      name: such as "BLEU" or "F1".
      predict: parameters and held-out examples -> integers, the leading axis is the example. In
        :func:`module_task`, the module instead of the parameters.
      score: these integers for all held-out examples of the task -> the score in percent.
    """

    name: str
    predict: Callable[[Any, Batch], jax.Array]
    score: Callable[[np.ndarray], float]


class Task(NamedTuple):
    """A fixed model, data set, loss, metric and batch size.

    Attributes:
      name: name on the command line.
      init: from a key to initial parameters.
      loss: mean loss of a batch, a scalar.
      metric: metric of a batch of held-out examples, in the unit and direction of ``measure``.
      metric_name: name of the metric, such as "accuracy".
      train: training examples; the leading axis of each array is the example.
      test: held-out examples.
      batch_size: examples per step.
      learning_rates: for each optimizer, initial rates: too low, suitable, too high.
      measure: the kind of metric: "accuracy", from 0 to 1, higher is better; "return", at most 1, higher is
        better; "loss", 0 or more, lower is better.
      test_loss: the loss of held-out examples, if it differs from ``loss`` (dropout, reinforcement learning).
      collector: makes each step's batch from the drawn training examples; :data:`DRAWN` leaves them alone.
      text: a score of predicted text, for tasks on text that have one.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    metric: Callable[[Params, Batch], jax.Array]
    metric_name: str
    train: Batch
    test: Batch
    batch_size: int
    learning_rates: Mapping[str, tuple[float, ...]] = LEARNING_RATES
    measure: Literal["accuracy", "return", "loss"] = "accuracy"
    test_loss: Callable[[Params, Batch], jax.Array] | None = None
    collector: Collector = DRAWN
    text: TextScore | None = None

    @property
    def held_out_loss(self) -> Callable[[Params, Batch], jax.Array]:
        """The loss of held-out examples: ``test_loss``, or ``loss`` if there is none."""
        return self.loss if self.test_loss is None else self.test_loss

    @property
    def num_examples(self) -> int:
        """Number of training examples."""
        return len(next(iter(self.train.values())))

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in one pass over the training examples."""
        return self.num_examples // self.batch_size


class Objective(NamedTuple):
    """Loss and metric of a module on a batch; shared by tasks of one kind."""

    loss: Callable[[Any, Batch], jax.Array]
    metric: Callable[[Any, Batch], jax.Array]
    metric_name: str


def module_task(
    name: str,
    make_module: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    train: Batch,
    test: Batch,
    batch_size: int,
    learning_rates: Mapping[str, tuple[float, ...]] = LEARNING_RATES,
    text: TextScore | None = None,
) -> Task:
    """Builds a task from a Flax NNX module whose state consists of ``nnx.Param`` only.

    Args:
      name: as in :class:`Task`.
      make_module: from random number streams to the module.
      objective: loss and metric of the module.
      train: as in :class:`Task`.
      test: as in :class:`Task`.
      batch_size: as in :class:`Task`.
      learning_rates: as in :class:`Task`.
      text: as in :class:`Task`, with a prediction from the module.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), nnx.Param)
    return Task(
        name,
        init=lambda key: nnx.state(make_module(nnx.Rngs(key)), nnx.Param),
        loss=lambda params, batch: objective.loss(nnx.merge(graph, params), batch),
        metric=lambda params, batch: objective.metric(nnx.merge(graph, params), batch),
        metric_name=objective.metric_name,
        train=train,
        test=test,
        batch_size=batch_size,
        learning_rates=learning_rates,
        text=text
        and text._replace(predict=lambda params, batch: text.predict(nnx.merge(graph, params), batch)),
    )


def _classification_loss(module: Any, batch: Batch) -> jax.Array:
    logits = module(batch["input"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


def _classification_accuracy(module: Any, batch: Batch) -> jax.Array:
    return jnp.mean(jnp.argmax(module(batch["input"]), axis=-1) == batch["label"])


# Inputs under "input", integer labels under "label": one per example, pixel or token.
CLASSIFICATION = Objective(_classification_loss, _classification_accuracy, "accuracy")
