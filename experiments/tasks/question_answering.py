"""Extractive question answering: the default of a parameter, as a span of the function's signature.

Source of the two heads: J. Devlin et al., "BERT", 2018, Section 4.2.
"""

import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.stdlib import StdlibDefaults
from experiments.tasks.base import Batch, Objective, Task, module_task
from experiments.tasks.text_scores import answer_score
from experiments.tasks.transformer import Transformer, padding_mask

_WIDTH, _LAYERS = 48, 2
_WORDS, _LENGTH, _SEPARATOR = 1000, 48, 1
_WORD = re.compile(r"\w+|[^\w\s]")


class SpanFinder(nnx.Module):
    """An encoder over question and context, with scores of each position as start and end of the answer."""

    def __init__(self, encoder: Transformer, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.span = nnx.Linear(encoder.width, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Scores, shape (batch, 2, length); -1e9 for padding."""
        scores = self.span(self.encoder(tokens, padding_mask(tokens)))
        return jnp.where(tokens[:, None] == 0, -1e9, jnp.swapaxes(scores, 1, 2))


def _loss(module: SpanFinder, batch: Batch) -> jax.Array:
    scores = module(batch["input"])
    # All positions share a bias. If training diverges, the bias is huge, and cancellation in Optax's loss
    # would round the loss to 0.
    scores -= jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["span"]))


def _answer(module: SpanFinder, batch: Batch) -> jax.Array:
    """The most probable first and last position of each answer, shape (batch, 2)."""
    return jnp.argmax(module(batch["input"]), axis=-1)


def _exact_match(module: SpanFinder, batch: Batch) -> jax.Array:
    """Fraction of answers with correct start and end."""
    return jnp.mean(jnp.all(_answer(module, batch) == batch["span"], axis=-1))


OBJECTIVE = Objective(_loss, _exact_match, "exact match")


def _encode(parameter: str, signature: str, start: int, end: int) -> tuple[list[int], list[int]]:
    """Tokens (parameter, separator, words of the signature), and positions of the answer's two ends."""
    words = list(_WORD.finditer(signature))
    inside = [index for index, word in enumerate(words) if start <= word.start() and word.end() <= end]
    tokens = [_hash(parameter), _SEPARATOR, *(_hash(word.group()) for word in words)]
    return tokens, [2 + inside[0], 2 + inside[-1]]


def _hash(word: str) -> int:
    """Index of a word. Hashing distinguishes rare names, which a token for unknown words would not."""
    return 2 + zlib.crc32(word.encode()) % (_WORDS - 2)


def make(data_dir: Path | None = None) -> Task:
    """Finds a parameter's default among the words of the signature."""

    def load(split: str) -> Batch:
        rows = load_split(StdlibDefaults, split, data_dir)
        tokens, spans = [], []
        for index in range(len(rows["start"])):
            texts = (rows[name][index].decode() for name in ("parameter", "signature"))
            row, span = _encode(*texts, rows["start"][index], rows["end"][index])
            if len(row) <= _LENGTH:  # the longest have 39
                tokens.append(row + [0] * (_LENGTH - len(row)))
                spans.append(span)
        return {"input": np.array(tokens, np.int32), "span": np.array(spans, np.int32)}

    test = load("test")
    return module_task(
        "question-answering",
        lambda rngs: SpanFinder(Transformer(_WORDS, _LENGTH, _WIDTH, _LAYERS, rngs=rngs), rngs=rngs),
        OBJECTIVE,
        load("train"),
        test,
        batch_size=16,
        text=answer_score(test["input"], test["span"], _answer),
    )
