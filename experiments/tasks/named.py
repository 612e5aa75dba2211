"""Networks whose parameters are a dict of arrays by name, as they are stored in files and adapted in part."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.tasks.base import Batch, Collector, Objective, Task

Arrays = dict[str, Any]  # an array for each name, such as "encoder.norm.scale"


class Network(NamedTuple):
    """A Flax NNX module as functions of its parameters by name.

    Attributes:
      init: from a key to parameters.
      module: from parameters to the module.
      shapes: of the parameters.
    """

    init: Callable[[jax.Array], Arrays]
    module: Callable[[Arrays], Any]
    shapes: dict[str, tuple[int, ...]]


def make_network(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The network of a module whose state consists of ``nnx.Param`` only.

    Examples:
      >>> network = make_network(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
      >>> network.shapes
      {'bias': (3,), 'kernel': (2, 3)}
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), nnx.Param)
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in paths
    ]

    def init(key: jax.Array) -> Arrays:
        return dict(
            zip(names, jax.tree.leaves(nnx.state(make_module(nnx.Rngs(key)), nnx.Param)), strict=True)
        )

    def module(params: Arrays) -> Any:
        return nnx.merge(graph, structure.unflatten([params[name] for name in names]))

    return Network(init, module, {name: leaf.shape for name, (_, leaf) in zip(names, paths, strict=True)})


def network_task(
    name: str,
    network: Network,
    objective: Objective,
    train: Batch,
    test: Batch,
    batch_size: int,
    **options: Any,
) -> Task:
    """A task that trains all parameters of a network.

    Args:
      name: as in :class:`~experiments.tasks.base.Task`.
      network: what is trained.
      objective: loss and metric of its module.
      train: as in :class:`~experiments.tasks.base.Task`.
      test: as in :class:`~experiments.tasks.base.Task`.
      batch_size: as in :class:`~experiments.tasks.base.Task`.
      options: further fields of :class:`~experiments.tasks.base.Task`.
    """
    return Task(
        name,
        init=network.init,
        loss=lambda params, batch: objective.loss(network.module(params), batch),
        metric=lambda params, batch: objective.metric(network.module(params), batch),
        metric_name=objective.metric_name,
        train=train,
        test=test,
        batch_size=batch_size,
        **options,
    )


def with_wrong_labels(task: Task, start: int, count: int = 5) -> Task:
    """A task in which all labels of ``count`` batches from step ``start`` on belong to other examples.

    The labels are the arrays of a batch other than "input", "source" and "positions"; each example has those
    of the example before it.
    """
    inputs = ("input", "source", "positions")

    def init(key: jax.Array, params: Any) -> Any:
        return 0, task.collector.init(key, params)

    def collect(state: Any, params: Any, batch: Batch) -> tuple[Any, Batch]:
        step, inner = state
        inner, batch = task.collector.collect(inner, params, batch)
        is_wrong = (step >= start) & (step < start + count)
        wrong = {
            name: rows if name in inputs else jax.numpy.where(is_wrong, jax.numpy.roll(rows, 1, axis=0), rows)
            for name, rows in batch.items()
        }
        return (step + 1, inner), wrong

    return task._replace(collector=Collector(init, collect))
