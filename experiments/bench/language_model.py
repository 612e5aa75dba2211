"""The language model that benchmarks train on an accelerator: a transformer of the size of GPT-2 small.

Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2.
"""

from typing import NamedTuple

import jax
from flax import nnx

from experiments.tasks.base import CLASSIFICATION, Task, module_task
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
    """A causal transformer with tied input and output embeddings."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.transformer = Transformer(
            size.vocabulary, size.length, size.width, size.layers, heads=size.heads, expansion=4, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of each next token, shape (batch, length, vocabulary)."""
        return self.transformer.tokens.attend(self.transformer(tokens, causal_mask(tokens)))


def make_task(size: Size) -> Task:
    """The model and one batch of random tokens."""
    shape = (size.batch, size.length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
    batch = {"input": tokens[:, :-1], "label": tokens[:, 1:]}
    return module_task(
        "language-model",
        lambda rngs: LanguageModel(size, rngs=rngs),
        CLASSIFICATION,
        train=batch,
        test=batch,
        batch_size=size.batch,
    )
