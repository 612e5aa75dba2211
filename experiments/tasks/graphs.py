"""Node classification by a graph network with dropout, on graphs that are made for it.

Source: T. N. Kipf and M. Welling, "Semi-Supervised Classification with Graph Convolutional Networks", 2017.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import accuracy, cross_entropy, dense, init_mlp

_HIDDEN, _FEATURES, _DROPOUT = 32, 32, 0.5
_LABELLED = 20  # nodes of each class
_SEEDS = 2**14


def _block_graph(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A stochastic block model: 600 nodes of 6 classes, 5 neighbours of the same class and 4 of others."""
    classes, size = 6, 100
    labels = np.repeat(np.arange(classes), size)
    same = labels[:, None] == labels[None]
    probability = np.where(same, 5 / size, 4 / ((classes - 1) * size))
    upper = np.triu(rng.random(same.shape) < probability, 1)
    return upper | upper.T, labels


def _ring_graph(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A ring of 640 nodes, 6 neighbours each, some rewired; an arc of 20 nodes is of one of 4 classes."""
    count, arcs = 640, 32
    labels = np.repeat(rng.permutation(np.arange(arcs) % 4), count // arcs)
    adjacency = np.zeros((count, count), bool)
    for offset in (1, 2, 3):
        ends = (np.arange(count) + offset) % count
        ends = np.where(rng.random(count) < 0.15, rng.integers(0, count, count), ends)
        adjacency[np.arange(count), ends] = True
    np.fill_diagonal(adjacency, False)
    return adjacency | adjacency.T, labels


GRAPHS = {"blocks": _block_graph, "rings": _ring_graph}


def make(name: str, graph: str) -> Task:
    """Two graph convolutions with dropout; twenty nodes of each class are labelled, the others are the test.

    A training example is the seed of a step's dropout; each step sees the whole graph.
    """
    rng = np.random.default_rng(0)
    adjacency, labels = GRAPHS[graph](rng)
    classes = labels.max() + 1
    centres = rng.normal(size=(classes, _FEATURES))
    features = (0.25 * centres[labels] + rng.normal(size=(len(labels), _FEATURES))).astype(np.float32)
    linked = adjacency + np.eye(len(labels))
    degree = linked.sum(axis=1)
    propagate = (linked / np.sqrt(degree[:, None] * degree)).astype(np.float32)
    order = rng.permutation(len(labels))
    labelled = np.concatenate([order[labels[order] == label][:_LABELLED] for label in range(classes)])
    held_out = np.setdiff1d(order, labelled)

    def logits(params: Params, key: jax.Array | None) -> jax.Array:
        hidden = jnp.asarray(features)
        for index, layer in enumerate(params):
            if key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - _DROPOUT, hidden.shape)
                hidden = jnp.where(kept, hidden / (1 - _DROPOUT), 0)
            hidden = dense(layer, propagate @ hidden)
            hidden = jax.nn.relu(hidden) if index < len(params) - 1 else hidden
        return hidden

    def loss(params: Params, batch: Batch) -> jax.Array:
        given = logits(params, jax.random.key(batch["seed"][0]))[labelled]
        return cross_entropy(given, jnp.asarray(labels[labelled]))

    return Task(
        name,
        init=lambda key: init_mlp(key, (_FEATURES, _HIDDEN, int(classes))),
        loss=loss,
        metric=lambda params, batch: accuracy(logits(params, None)[held_out], labels[held_out]),
        metric_name="accuracy",
        train={"seed": np.arange(_SEEDS, dtype=np.uint32)},
        test={"seed": np.zeros(1, np.uint32)},
        batch_size=1,
        test_loss=lambda params, batch: cross_entropy(
            logits(params, None)[held_out], jnp.asarray(labels[held_out])
        ),
    )
