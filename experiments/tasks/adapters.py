"""Fine-tuning by low-rank adapters: a network that was trained on some classes learns the others.

Source: E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import classification_task, cross_entropy, dense, init_mlp, mlp
from experiments.tasks.variants import load_flat

_HIDDEN, _CLASSES = 128, 5
RANK = 4
SCALE = 2.0  # of the product of A and B, alpha / rank in the paper
_PRETRAINING_STEPS, _PRETRAINING_BATCH = 500, 64


def _pretrained(train: Batch, sizes: tuple[int, ...]) -> Params:
    """A perceptron after a short training with AdamW; the same each time."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, _PRETRAINING_STEPS))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(train["label"]), (_PRETRAINING_STEPS, _PRETRAINING_BATCH))

    def step(carry, batch):
        params, state = carry
        loss = lambda p: cross_entropy(mlp(p, batch["input"]), batch["label"])  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = init_mlp(jax.random.key(0), sizes)
    batches = jax.tree.map(lambda leaf: leaf[rows], train)
    (params, _), _ = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(
        (params, optimizer.init(params)), batches
    )
    return jax.device_get(params)


def init_adapter(key: jax.Array, inputs: int, outputs: int, rank: int) -> Params:
    """The factors A, random, and B, 0, of an adapter of a matrix, shape (inputs, outputs)."""
    return {
        "A": jax.nn.initializers.lecun_normal()(key, (inputs, rank)),
        "B": jnp.zeros((rank, outputs)),
    }


def make(name: str, data: str, data_dir: Path | None = None) -> Task:
    """Adapters of rank 4 at each layer of a perceptron trained on classes 0 to 4 learn classes 5 to 9.

    The parameters are the adapters, of which B is 0 at the start; the network itself is constant.
    """
    train, test = (load_flat(data, split, data_dir) for split in ("train", "test"))

    def part(examples: Batch, first: int) -> Batch:
        rows = (examples["label"] >= first) & (examples["label"] < first + _CLASSES)
        return {"input": examples["input"][rows], "label": examples["label"][rows] - np.int32(first)}

    frozen = _pretrained(part(train, 0), (train["input"].shape[1], _HIDDEN, _HIDDEN, _CLASSES))

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(frozen))
        return [
            init_adapter(key, *layer["kernel"].shape, RANK) for key, layer in zip(keys, frozen, strict=True)
        ]

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for index, (layer, adapter) in enumerate(zip(frozen, params, strict=True)):
            hidden = dense(layer, hidden) + SCALE * (hidden @ adapter["A"]) @ adapter["B"]
            hidden = jax.nn.relu(hidden) if index < len(frozen) - 1 else hidden
        return hidden

    return classification_task(name, init, apply, part(train, _CLASSES), part(test, _CLASSES), batch_size=64)
