"""Small networks as pure functions of a pytree of arrays, for tasks that change how parameters are stored."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.base import LEARNING_RATES, Batch, Params, Task

Apply = Callable[[Params, jax.Array], jax.Array]


def init_dense(key: jax.Array, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, jax.Array]:
    """A linear layer: LeCun's normal initialization times ``scale``, and biases of 0."""
    kernel = scale * jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def dense(layer: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Applies a linear layer to the last axis."""
    return inputs @ layer["kernel"] + layer["bias"]


def init_mlp(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    """The linear layers of a multilayer perceptron, from the number of inputs to that of outputs."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [init_dense(*layer) for layer in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def mlp(
    layers: Sequence[dict[str, jax.Array]],
    inputs: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> jax.Array:
    """Applies a multilayer perceptron to the last axis, with no activation after the last layer."""
    hidden = inputs
    for layer in layers[:-1]:
        hidden = activation(dense(layer, hidden))
    return dense(layers[-1], hidden)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of examples whose largest logit is that of the label."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def classification_task(
    name: str,
    init: Callable[[jax.Array], Params],
    apply: Apply,
    train: Batch,
    test: Batch,
    batch_size: int,
    learning_rates: Mapping[str, tuple[float, ...]] = LEARNING_RATES,
) -> Task:
    """A task of classification with a pure function from parameters and inputs to logits."""
    return Task(
        name,
        init=init,
        loss=lambda params, batch: cross_entropy(apply(params, batch["input"]), batch["label"]),
        metric=lambda params, batch: accuracy(apply(params, batch["input"]), batch["label"]),
        metric_name="accuracy",
        train=train,
        test=test,
        batch_size=batch_size,
        learning_rates=learning_rates,
    )
