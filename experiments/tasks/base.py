"""What a task is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Params = Any
Batch = dict[str, jax.Array]


class Task(NamedTuple):
    """A fixed model, data set, loss, metric and batch size.

    Attributes:
      name: what it is called on the command line.
      init: from a key to the parameters.
      loss: the mean loss of a batch, a scalar.
      accuracy: the fraction of a batch that is classified correctly.
      train: the training examples, the example as the leading axis.
      test: the held-out examples.
      batch_size: examples a step.
      learning_rates: for each optimizer, initial rates to start from: too low, fitting, too high.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    accuracy: Callable[[Params, Batch], jax.Array]
    train: Batch
    test: Batch
    batch_size: int
    learning_rates: Mapping[str, tuple[float, ...]]

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the training examples."""
        return len(next(iter(self.train.values()))) // self.batch_size
