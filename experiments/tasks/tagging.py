"""Tagging of Python tokens with their syntactic roles by an encoder transformer."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.stdlib import ROLES, WINDOW, StdlibTokens
from experiments.data.vocabulary import Vocabulary
from experiments.tasks.base import CLASSIFICATION, Batch, Task, module_task
from experiments.tasks.transformer import Transformer, at_positions, padding_mask

_WORDS, _WIDTH, _LAYERS = 500, 48, 2
_MAX_TEST = 500


class Tagger(nnx.Module):
    """An encoder with a linear classifier of each token."""

    def __init__(self, encoder: Transformer, classes: int, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.logits = nnx.Linear(encoder.width, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Logits, shape (batch, length, classes), or those at some positions, (batch, n, classes)."""
        return self.logits(at_positions(self.encoder(tokens, padding_mask(tokens)), positions))


def make(data_dir: Path | None = None) -> Task:
    """Windows of 48 tokens, 11 roles, a vocabulary of 500 words."""
    splits = {split: load_split(StdlibTokens, split, data_dir) for split in ("train", "test")}
    tokens = {split: [row.decode().split(" ") for row in rows["tokens"]] for split, rows in splits.items()}
    vocabulary = Vocabulary(tokens["train"], _WORDS)

    def encode(split: str, limit: int | None) -> Batch:
        rows = [vocabulary.encode(row, WINDOW) for row in tokens[split][:limit]]
        return {"input": np.stack(rows), "label": splits[split]["roles"][:limit].astype("int32")}

    return module_task(
        "tagging",
        lambda rngs: Tagger(
            Transformer(len(vocabulary), WINDOW, _WIDTH, _LAYERS, rngs=rngs), len(ROLES), rngs=rngs
        ),
        CLASSIFICATION,
        encode("train", None),
        encode("test", _MAX_TEST),
        batch_size=16,
    )
