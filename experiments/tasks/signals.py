"""Classification of MNIST-1D's signals by a convolutional and by a recurrent network."""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.tasks.base import Params, Task
from experiments.tasks.networks import classification_task, dense, init_dense
from experiments.tasks.variants import CLASSES, load_flat

_CHANNELS, _WINDOW = (16, 32), 5
_UNITS, _PIECE = 32, 4  # of the recurrent network: units, and values of the signal in a step


def _windows(signal: jax.Array, stride: int) -> jax.Array:
    """Windows of a padded signal, from shape (batch, length, channels) to (batch, length / stride, ...)."""
    length = signal.shape[1]
    padded = jnp.pad(signal, ((0, 0), (_WINDOW // 2, _WINDOW // 2), (0, 0)))
    parts = [padded[:, start : start + length : stride] for start in range(_WINDOW)]
    return jnp.concatenate(parts, axis=-1)


def make_convolution(name: str, data_dir: Path | None = None) -> Task:
    """Two convolutions of stride 2, a mean over positions, a linear layer."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        return [
            init_dense(keys[0], _WINDOW, _CHANNELS[0]),
            init_dense(keys[1], _WINDOW * _CHANNELS[0], _CHANNELS[1]),
            init_dense(keys[2], _CHANNELS[1] * 10, CLASSES),
        ]

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        hidden = inputs[..., None]
        for layer in params[:-1]:
            hidden = jax.nn.relu(dense(layer, _windows(hidden, 2)))
        return dense(params[-1], hidden.reshape(len(inputs), -1))

    splits = (load_flat("mnist1d", split, data_dir) for split in ("train", "test"))
    return classification_task(name, init, apply, *splits, batch_size=64)


def make_recurrent(name: str, data_dir: Path | None = None) -> Task:
    """A gated recurrent unit that reads four values a step; its last state gives the logits."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "gates": init_dense(keys[0], _PIECE + _UNITS, 2 * _UNITS),
            "candidate": init_dense(keys[1], _PIECE + _UNITS, _UNITS),
            "logits": init_dense(keys[2], _UNITS, CLASSES),
        }

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        def step(state, piece):
            gates = jax.nn.sigmoid(dense(params["gates"], jnp.concatenate([piece, state], axis=1)))
            reset, update = jnp.split(gates, 2, axis=1)
            candidate = dense(params["candidate"], jnp.concatenate([piece, reset * state], axis=1))
            return update * state + (1 - update) * jnp.tanh(candidate), None

        pieces = inputs.reshape(len(inputs), -1, _PIECE).swapaxes(0, 1)
        state, _ = jax.lax.scan(step, jnp.zeros((len(inputs), _UNITS)), pieces)
        return dense(params["logits"], state)

    splits = (load_flat("mnist1d", split, data_dir) for split in ("train", "test"))
    return classification_task(name, init, apply, *splits, batch_size=64)
