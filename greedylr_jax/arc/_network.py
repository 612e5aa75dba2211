"""ARC's network: maps 300 rows of losses and rates to the probabilities of raise, keep and lower.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4 and
Figure 2: convolutions with max-pooling, LSTMs and two dense layers. There are two architectures:

* :data:`PUBLISHED`, the paper's, of the authors' weights: two convolutions and two LSTMs, 79,043 parameters.
  A decision takes as long as ten training steps of a network with a few thousand parameters.
* :data:`SMALL`, of the weights in the package: one convolution and one LSTM, 9,315 parameters. Its
  convolution has stride four and its max-pooling width five, so the LSTM has 15 steps instead of 72, five per
  cycle. A decision takes a tenth of the time.

Weights are a flat dict of arrays with the names and the layout of the published file; the names determine the
architecture.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from greedylr_jax import _checks
from greedylr_jax.arc._features import ROWS

ACTIONS = ("raise", "keep", "lower")
Weights = Mapping[str, ArrayLike]
_FEW = 16  # inputs of one output of a convolution, for which a sum is faster than a matrix product


class Architecture(NamedTuple):
    """Sizes of a network. Each convolution and the first dense layer are followed by ReLU."""

    width: int  # kernel size of the convolutions, in rows
    stride: int  # stride of the convolutions, in rows: 1, or the width
    pool: int  # width of the max-pooling after each convolution
    filters: tuple[int, ...]  # filters of each convolution
    units: tuple[int, ...]  # units of each LSTM
    hidden: int  # units of the first dense layer

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        channels = 3
        for name, filters in zip(_names("conv1d", self.filters), self.filters, strict=True):
            shapes |= {f"{name}/kernel": (self.width, channels, filters), f"{name}/bias": (filters,)}
            channels = filters
        for name, units in zip(_names("lstm", self.units), self.units, strict=True):
            own = {
                "kernel": (channels, 4 * units),
                "recurrent_kernel": (units, 4 * units),
                "bias": (4 * units,),
            }
            shapes |= {f"{name}/{array}": shape for array, shape in own.items()}
            channels = units
        for name, units in (("dense", self.hidden), ("dense_1", len(ACTIONS))):
            shapes |= {f"{name}/kernel": (channels, units), f"{name}/bias": (units,)}
            channels = units
        return shapes


PUBLISHED = Architecture(width=5, stride=1, pool=2, filters=(32, 64), units=(64, 64), hidden=32)
SMALL = Architecture(width=4, stride=4, pool=5, filters=(32,), units=(32,), hidden=16)


def _names(layer: str, sizes: tuple[int, ...]) -> list[str]:
    """Keras's names of several layers of one kind: ``lstm``, ``lstm_1``, ..."""
    return [layer if number == 0 else f"{layer}_{number}" for number in range(len(sizes))]


class Lstm(nnx.Module):
    """A long short-term memory with the gates in the order input, forget, cell, output."""

    def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs):
        # Keras's initializers: Glorot uniform, orthogonal, and a bias of 1 for the forget gate.
        initializers = nnx.initializers
        self.kernel = nnx.Param(initializers.glorot_uniform()(rngs.params(), (inputs, 4 * units)))
        self.recurrent_kernel = nnx.Param(initializers.orthogonal()(rngs.params(), (units, 4 * units)))
        self.bias = nnx.Param(jnp.concatenate([jnp.zeros(units), jnp.ones(units), jnp.zeros(2 * units)]))

    def __call__(self, sequence: jax.Array) -> jax.Array:
        """All outputs, shape (..., length, units), of a sequence of shape (..., length, inputs)."""
        kernel = jnp.concatenate([self.kernel[...], self.recurrent_kernel[...]])
        bias = self.bias[...]

        def step(carry: tuple[jax.Array, jax.Array], inputs: jax.Array) -> tuple[tuple, jax.Array]:
            output, cell = carry
            gates = jnp.concatenate([inputs, output], axis=-1) @ kernel + bias
            enter, forget, candidate, leave = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            output = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (output, cell), output

        start = jnp.zeros((*sequence.shape[:-2], len(bias) // 4), sequence.dtype)
        _, outputs = jax.lax.scan(step, (start, start), jnp.moveaxis(sequence, -2, 0))
        return jnp.moveaxis(outputs, 0, -2)


class ArcNetwork(nnx.Module):
    """Convolutions, LSTMs and two dense layers, named as in the published file."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        self.architecture = architecture
        glorot = nnx.initializers.glorot_uniform()
        for layer, arrays in _by_layer(architecture.shapes()).items():
            *width, inputs, outputs = arrays["kernel"]
            if layer.startswith("conv1d"):
                made = nnx.Conv(
                    inputs,
                    outputs,
                    width,
                    architecture.stride,
                    padding="VALID",
                    kernel_init=glorot,
                    conv_general_dilated=_valid_convolution,
                    rngs=rngs,
                )
            elif layer.startswith("lstm"):
                made = Lstm(inputs, outputs // 4, rngs=rngs)
            else:
                made = nnx.Linear(inputs, outputs, kernel_init=glorot, rngs=rngs)
            setattr(self, layer, made)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits of the three actions, shape (..., 3), of features of shape (..., 300, 3)."""
        hidden = features
        for name in _names("conv1d", self.architecture.filters):
            hidden = _pooled_maximum(nnx.relu(getattr(self, name)(hidden)), self.architecture.pool)
        for name in _names("lstm", self.architecture.units):
            hidden = getattr(self, name)(hidden)
        dense, dense_1 = getattr(self, "dense"), getattr(self, "dense_1")  # noqa: B009 (set by name above)
        return dense_1(nnx.relu(dense(hidden[..., -1, :])))


def _by_layer(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups arrays with names such as ``"lstm/kernel"`` by layer."""
    layers: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        layer, own = name.split("/")
        layers.setdefault(layer, {})[own] = array
    return layers


def _valid_convolution(
    sequence: jax.Array, kernel: jax.Array, strides: tuple[int], *args: object, **kwargs: object
) -> jax.Array:
    """A convolution without padding, with a stride of 1 or its width.

    It is computed as one matrix product, which is several times faster than XLA's convolution inside a loop
    on a CPU. For a single small sequence it is computed as a sum: XLA distributes matrix products over
    threads, which takes longer to start than the sum takes.
    """
    width, channels, filters = kernel.shape
    if strides == (1,):
        length = sequence.shape[-2] - width + 1
        windows = [sequence[..., start : start + length, :] for start in range(width)]
        seen = jnp.concatenate(windows, axis=-1)
    else:
        seen = sequence.reshape(*sequence.shape[:-2], -1, width * channels)
    flat = kernel.reshape(width * channels, filters)
    is_single = math.prod(seen.shape[:-2]) == 1
    if is_single and len(flat) <= _FEW:
        terms = [seen[..., place, None] * flat[place] for place in range(len(flat))]
        return sum(terms[1:], start=terms[0])
    return seen @ flat


def _pooled_maximum(sequence: jax.Array, pool: int) -> jax.Array:
    """The maximum of each ``pool`` neighbours, shape (..., length // pool, channels)."""
    return functools.reduce(jnp.maximum, [sequence[..., start::pool, :] for start in range(pool)])


@functools.cache
def _graph(architecture: Architecture) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: ArcNetwork(architecture, rngs=nnx.Rngs(0))), nnx.Param)[0]


def initial_weights(key: jax.Array, architecture: Architecture = SMALL) -> dict[str, jax.Array]:
    """Random initial weights, from the distributions that Keras uses.

    Args:
      key: random key.
      architecture: :data:`SMALL` (default) or :data:`PUBLISHED`.

    Returns:
      A dict from names to float32 arrays.

    Examples:
      >>> sum(array.size for array in initial_weights(jax.random.key(0)).values())
      9315
      >>> sum(array.size for array in initial_weights(jax.random.key(0), PUBLISHED).values())
      79043
    """
    network = ArcNetwork(architecture, rngs=nnx.Rngs(key))
    names = {name: name.split("/") for name in architecture.shapes()}
    return {name: getattr(getattr(network, layer), array)[...] for name, (layer, array) in names.items()}


def architecture_of(weights: Weights) -> Architecture:
    """The architecture of weights, by their names."""
    larger = PUBLISHED.shapes().keys() - SMALL.shapes().keys()
    return PUBLISHED if weights.keys() & larger else SMALL


def check_weights(weights: Weights) -> dict[str, jax.Array | np.ndarray]:
    """Returns the weights in float32, NumPy or JAX arrays, or raises ``ValueError`` if they do not fit."""
    shapes = architecture_of(weights).shapes()
    if missing := shapes.keys() - weights.keys():
        raise ValueError(f"weights lack {sorted(missing)}; they must hold {sorted(shapes)}.")
    if unknown := weights.keys() - shapes.keys():
        raise ValueError(f"weights hold unknown arrays {sorted(unknown)}; they must be {sorted(shapes)}.")
    for name, shape in shapes.items():
        if jnp.shape(weights[name]) != shape:
            raise ValueError(f"weights[{name!r}] must have shape {shape}, got {jnp.shape(weights[name])}.")
    return {name: _as_float32(weights[name]) for name in shapes}


def _as_float32(array: ArrayLike) -> jax.Array | np.ndarray:
    """An array in float32. Of arrays on the host a NumPy array, which belongs to no trace."""
    if isinstance(array, jax.Array) and (_checks.is_traced(array) or array.dtype == jnp.float32):
        return array.astype(jnp.float32)
    return np.asarray(array, np.float32)


def action_logits(weights: Weights, features: ArrayLike) -> jax.Array:
    """Logits of the three actions, for training; arguments as for :func:`action_probabilities`."""
    network = nnx.merge(_graph(architecture_of(weights)), nnx.State(_by_layer(weights)))
    # Accelerators multiply float32 matrices in lower precision by default, which can change a decision.
    with jax.default_matmul_precision("highest"):
        return network(jnp.asarray(features, jnp.float32))


def action_probabilities(weights: Weights, features: ArrayLike) -> jax.Array:
    """Evaluates the network.

    Args:
      weights: weights by name, see :func:`greedylr_jax.arc.load_weights`.
      features: array of shape (..., 300, 3), see :func:`greedylr_jax.arc.batch_features`.

    Returns:
      Array of shape (..., 3), float32: the probabilities of raise, keep and lower.

    Raises:
      ValueError: if the weights or the features have other shapes.

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
