"""The language model that benchmarks train on an accelerator: a transformer as large as the smallest GPT-2.

Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.tasks.transformer import Transformer, causal_mask


class Size(NamedTuple):
    """Sizes of the model and of its batch."""

    vocabulary: int = 50_257
    length: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    batch: int = 8


class LanguageModel(nnx.Module):
    """A transformer that sees what came before, whose embedding gives the logits, too."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.transformer = Transformer(
            size.vocabulary, size.length, size.width, size.layers, heads=size.heads, expansion=4, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of each next token, shape (batch, length, vocabulary)."""
        return self.transformer.tokens.attend(self.transformer(tokens, causal_mask(tokens)))


def make(size: Size) -> tuple[nnx.State, dict[str, jax.Array]]:
    """Parameters, and random tokens."""
    shape = (size.batch, size.length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
    params = nnx.state(LanguageModel(size, rngs=nnx.Rngs(0)), nnx.Param)
    return params, {"input": tokens[:, :-1], "label": tokens[:, 1:]}


def loss_of(size: Size) -> Callable[[Any, dict[str, Any]], jax.Array]:
    """Mean cross-entropy of the next tokens, as a function of the parameters and a batch."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(size, rngs=nnx.Rngs(0))), nnx.Param)

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        logits = nnx.merge(graph, params)(batch["input"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))

    return loss
