"""ARC's network: from 300 rows of losses and rates to the probabilities of raising, keeping and lowering the
rate.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4 and
Figure 2: two convolutions, each followed by a maximum over two, two LSTMs, two dense layers; 79,043
parameters. Weights are a flat dict of arrays, by the names and in the layout of the published file.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from greedylr_jax.arc.features import ROWS

ACTIONS = ("raise", "keep", "lower")
Weights = Mapping[str, ArrayLike]

_KERNEL, _FILTERS, _UNITS, _HIDDEN = 5, (32, 64), 64, 32
# Where each array of the published file lies in the module, and its shape.
_ARRAYS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "conv1d/kernel": ("conv_1", "kernel", (_KERNEL, 3, _FILTERS[0])),
    "conv1d/bias": ("conv_1", "bias", (_FILTERS[0],)),
    "conv1d_1/kernel": ("conv_2", "kernel", (_KERNEL, *_FILTERS)),
    "conv1d_1/bias": ("conv_2", "bias", (_FILTERS[1],)),
    "lstm/kernel": ("lstm_1", "kernel", (_FILTERS[1], 4 * _UNITS)),
    "lstm/recurrent_kernel": ("lstm_1", "recurrent_kernel", (_UNITS, 4 * _UNITS)),
    "lstm/bias": ("lstm_1", "bias", (4 * _UNITS,)),
    "lstm_1/kernel": ("lstm_2", "kernel", (_UNITS, 4 * _UNITS)),
    "lstm_1/recurrent_kernel": ("lstm_2", "recurrent_kernel", (_UNITS, 4 * _UNITS)),
    "lstm_1/bias": ("lstm_2", "bias", (4 * _UNITS,)),
    "dense/kernel": ("dense_1", "kernel", (_UNITS, _HIDDEN)),
    "dense/bias": ("dense_1", "bias", (_HIDDEN,)),
    "dense_1/kernel": ("dense_2", "kernel", (_HIDDEN, len(ACTIONS))),
    "dense_1/bias": ("dense_2", "bias", (len(ACTIONS),)),
}
SHAPES: dict[str, tuple[int, ...]] = {name: shape for name, (_, _, shape) in _ARRAYS.items()}


class Lstm(nnx.Module):
    """A long short-term memory with the gates in the order input, forget, cell, output."""

    def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs):
        # As Keras starts them: Glorot, orthogonal, and a forget gate that is open.
        initializers = nnx.initializers
        self.kernel = nnx.Param(initializers.glorot_uniform()(rngs.params(), (inputs, 4 * units)))
        self.recurrent_kernel = nnx.Param(initializers.orthogonal()(rngs.params(), (units, 4 * units)))
        self.bias = nnx.Param(jnp.concatenate([jnp.zeros(units), jnp.ones(units), jnp.zeros(2 * units)]))

    def __call__(self, sequence: jax.Array) -> jax.Array:
        """All outputs, shape (..., length, units), of a sequence of shape (..., length, inputs)."""
        # What does not depend on the state is one product for the whole sequence.
        projected = jnp.moveaxis(sequence @ self.kernel[...] + self.bias[...], -2, 0)
        recurrent_kernel = self.recurrent_kernel[...]

        def step(carry: tuple[jax.Array, jax.Array], inputs: jax.Array) -> tuple[tuple, jax.Array]:
            output, cell = carry
            enter, forget, candidate, leave = jnp.split(inputs + output @ recurrent_kernel, 4, axis=-1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            output = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (output, cell), output

        start = jnp.zeros((*sequence.shape[:-2], recurrent_kernel.shape[0]), projected.dtype)
        _, outputs = jax.lax.scan(step, (start, start), projected)
        return jnp.moveaxis(outputs, 0, -2)


class ArcNetwork(nnx.Module):
    """The network of Figure 2."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = {
            "padding": "VALID",
            "kernel_init": nnx.initializers.glorot_uniform(),
            "conv_general_dilated": _valid_convolution,
            "rngs": rngs,
        }
        self.conv_1 = nnx.Conv(3, _FILTERS[0], (_KERNEL,), **conv)
        self.conv_2 = nnx.Conv(*_FILTERS, (_KERNEL,), **conv)
        self.lstm_1 = Lstm(_FILTERS[1], _UNITS, rngs=rngs)
        self.lstm_2 = Lstm(_UNITS, _UNITS, rngs=rngs)
        dense = {"kernel_init": nnx.initializers.glorot_uniform(), "rngs": rngs}
        self.dense_1 = nnx.Linear(_UNITS, _HIDDEN, **dense)
        self.dense_2 = nnx.Linear(_HIDDEN, len(ACTIONS), **dense)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits of the three actions, shape (..., 3), of features of shape (..., 300, 3)."""
        hidden = _pairwise_maximum(nnx.relu(self.conv_1(features)))
        hidden = _pairwise_maximum(nnx.relu(self.conv_2(hidden)))
        last = self.lstm_2(self.lstm_1(hidden))[..., -1, :]
        return self.dense_2(nnx.relu(self.dense_1(last)))


def _valid_convolution(sequence: jax.Array, kernel: jax.Array, *args: object, **kwargs: object) -> jax.Array:
    """A convolution of stride 1 without padding, as one matrix product.

    XLA's own convolutions are several times slower than the product in a loop on a CPU.
    """
    width, channels, filters = kernel.shape
    length = sequence.shape[-2] - width + 1
    windows = [sequence[..., start : start + length, :] for start in range(width)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(width * channels, filters)


def _pairwise_maximum(sequence: jax.Array) -> jax.Array:
    """The maximum of each two neighbours, shape (..., length // 2, channels)."""
    return jnp.maximum(sequence[..., ::2, :], sequence[..., 1::2, :])


@functools.cache
def _graph() -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: ArcNetwork(rngs=nnx.Rngs(0))), nnx.Param)[0]


def initial_weights(key: jax.Array) -> dict[str, jax.Array]:
    """Weights to start training from, as Keras draws them.

    Args:
      key: of the random numbers.

    Examples:
      >>> sum(array.size for array in initial_weights(jax.random.key(0)).values())
      79043
    """
    network = ArcNetwork(rngs=nnx.Rngs(key))
    return {name: getattr(getattr(network, layer), array)[...] for name, (layer, array, _) in _ARRAYS.items()}


def check_weights(weights: Weights) -> dict[str, jax.Array]:
    """Returns the weights as float32 arrays, or raises ``ValueError`` that names what does not fit."""
    if missing := SHAPES.keys() - weights.keys():
        raise ValueError(f"weights lack {sorted(missing)}; they must hold {sorted(SHAPES)}.")
    if unknown := weights.keys() - SHAPES.keys():
        raise ValueError(f"weights hold unknown arrays {sorted(unknown)}; they must be {sorted(SHAPES)}.")
    for name, shape in SHAPES.items():
        if jnp.shape(weights[name]) != shape:
            raise ValueError(f"weights[{name!r}] must have shape {shape}, got {jnp.shape(weights[name])}.")
    return {name: jnp.asarray(weights[name], jnp.float32) for name in SHAPES}


def action_logits(weights: Weights, features: ArrayLike) -> jax.Array:
    """The logits of the three actions, for training; arguments as for :func:`action_probabilities`."""
    state: dict[str, dict[str, jax.Array]] = {}
    for name, (layer, array, _) in _ARRAYS.items():
        state.setdefault(layer, {})[array] = weights[name]
    # Accelerators multiply float32 in less unless they are told; a decision hangs on the difference.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(_graph(), nnx.State(state))(jnp.asarray(features, jnp.float32))


def action_probabilities(weights: Weights, features: ArrayLike) -> jax.Array:
    """What the network makes of features.

    Args:
      weights: by name, as :func:`greedylr_jax.arc.load_weights` returns them.
      features: shape (300, 3), or (..., 300, 3) for several at once, as
        :func:`greedylr_jax.arc.batch_features` makes them.

    Returns:
      Shape (3,), or (..., 3), float32: the probabilities of raising, keeping and lowering the rate.

    Raises:
      ValueError: if the weights or the features are not of these shapes.

    Examples:
      >>> weights = initial_weights(jax.random.key(0))
      >>> probabilities = action_probabilities(weights, jnp.zeros((300, 3)))
      >>> probabilities.shape, round(float(probabilities.sum()), 5)
      ((3,), 1.0)

    Source: Section 3.4, Figure 2.
    """
    weights = check_weights(weights)
    if jnp.shape(features)[-2:] != (ROWS, 3):
        raise ValueError(f"features must have shape (..., {ROWS}, 3), got {jnp.shape(features)}.")
    return jax.nn.softmax(action_logits(weights, features), axis=-1)
