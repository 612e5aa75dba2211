"""Character-level language modelling on the standard library's source: an LSTM and a transformer.

Source of the LSTM: S. Hochreiter and J. Schmidhuber, "Long Short-Term Memory", 1997.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.stdlib import StdlibText
from experiments.tasks.base import CLASSIFICATION, Batch, Task, module_task
from experiments.tasks.transformer import Transformer, at_positions, causal_mask

_CONTEXT, _CHARACTERS, _WIDTH = 64, 128, 48
_TEST_WINDOWS = 512


class LstmModel(nnx.Module):
    """An LSTM over embedded characters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(_CHARACTERS, _WIDTH, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(_WIDTH, 2 * _WIDTH, rngs=rngs), rngs=False)
        self.logits = nnx.Linear(2 * _WIDTH, _CHARACTERS, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Logits of each next character, shape (batch, length, characters)."""
        start = jnp.zeros((2, len(characters), 2 * _WIDTH))
        return self.logits(self.lstm(self.embed(characters), initial_carry=tuple(start)))


class TransformerModel(nnx.Module):
    """A causal transformer over characters or words."""

    def __init__(self, transformer: Transformer, *, rngs: nnx.Rngs):
        self.transformer = transformer
        self.logits = nnx.Linear(transformer.width, transformer.tokens.num_embeddings, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Logits of each next token, shape (batch, length, vocabulary), or those at some positions."""
        return self.logits(at_positions(self.transformer(tokens, causal_mask(tokens)), positions))


def _load(split: str, data_dir: Path | None) -> Batch:
    text = load_split(StdlibText, split, data_dir)["text"] & 127
    starts = range(0, text.shape[1] - _CONTEXT, _CONTEXT)
    # Consecutive windows share one character, the last target of the first and the first input of the second.
    windows = [text[:, start : start + _CONTEXT + 1] for start in starts]
    rows = [window for piece in zip(*windows, strict=True) for window in piece]
    if split == "test":
        rows = rows[:: max(1, len(rows) // _TEST_WINDOWS)][:_TEST_WINDOWS]
    rows = np.asarray(rows, np.int32)
    return {"input": rows[:, :-1], "label": rows[:, 1:]}


def _make(name: str, model: Callable[[nnx.Rngs], nnx.Module], data_dir: Path | None) -> Task:
    splits = (_load(split, data_dir) for split in ("train", "test"))
    return module_task(name, model, CLASSIFICATION, *splits, batch_size=16)


def make_lstm(data_dir: Path | None = None) -> Task:
    """Windows of 64 characters, 96 hidden units."""
    return _make("language-lstm", lambda rngs: LstmModel(rngs=rngs), data_dir)


def make_transformer(data_dir: Path | None = None) -> Task:
    """Windows of 64 characters, two layers."""

    def model(rngs: nnx.Rngs) -> TransformerModel:
        transformer = Transformer(_CHARACTERS, _CONTEXT, _WIDTH, layers=2, rngs=rngs)
        return TransformerModel(transformer, rngs=rngs)

    return _make("language-transformer", model, data_dir)
