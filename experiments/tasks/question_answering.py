"""Extractive question answering: which default has parameter p? The answer is a span of the signature.

Source of the two heads: J. Devlin et al., "BERT", 2018, Section 4.2.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.stdlib import PARAMETER, SIGNATURE, StdlibDefaults
from experiments.data.vocabulary import encode_characters
from experiments.tasks.base import Batch, Objective, Task, module_task
from experiments.tasks.transformer import Transformer, padding_mask

_WIDTH, _LAYERS = 48, 2


class SpanFinder(nnx.Module):
    """An encoder over question and context, and a score of each position to begin and to end the answer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.encoder = Transformer(128, PARAMETER + SIGNATURE, _WIDTH, _LAYERS, rngs=rngs)
        self.span = nnx.Linear(_WIDTH, 2, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Scores, shape (batch, 2, length); padding has none."""
        scores = self.span(self.encoder(characters, padding_mask(characters)))
        return jnp.where(characters[:, None] == 0, -1e9, jnp.swapaxes(scores, 1, 2))


def _loss(module: SpanFinder, batch: Batch) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(module(batch["input"]), batch["span"]))


def _exact_match(module: SpanFinder, batch: Batch) -> jax.Array:
    """The fraction of answers with both ends right."""
    return jnp.mean(jnp.all(jnp.argmax(module(batch["input"]), axis=-1) == batch["span"], axis=-1))


def make(data_dir: Path | None = None) -> Task:
    """Characters: 16 for the parameter, 80 for the signature."""

    def load(split: str) -> Batch:
        rows = load_split(StdlibDefaults, split, data_dir)
        texts = zip(rows["parameter"], rows["signature"], strict=True)
        encoded = [
            np.concatenate(
                [encode_characters(a.decode(), PARAMETER), encode_characters(b.decode(), SIGNATURE)]
            )
            for a, b in texts
        ]
        span = PARAMETER + np.stack([rows["start"], rows["end"] - 1], axis=1)
        return {"input": np.stack(encoded), "span": span.astype("int32")}

    return module_task(
        "question-answering",
        lambda rngs: SpanFinder(rngs=rngs),
        Objective(_loss, _exact_match, "exact match"),
        load("train"),
        load("test"),
        batch_size=8,
    )
