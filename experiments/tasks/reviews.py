"""Text classification: film reviews of the public set imdb_reviews, by an encoder transformer."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.data.loading import load_public
from experiments.data.vocabulary import Vocabulary, split_words
from experiments.tasks.base import CLASSIFICATION, Batch, Task, module_task
from experiments.tasks.transformer import Transformer, padding_mask

_WORDS, _LENGTH, _WIDTH, _LAYERS = 8000, 128, 64, 2
_MAX_TEST = 2000


class Classifier(nnx.Module):
    """An encoder, and a linear layer on the mean over the words without padding."""

    def __init__(self, words: int, *, rngs: nnx.Rngs):
        self.encoder = Transformer(words, _LENGTH, _WIDTH, _LAYERS, rngs=rngs)
        self.logits = nnx.Linear(_WIDTH, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, shape (batch, 2)."""
        hidden = self.encoder(tokens, padding_mask(tokens))
        return self.logits(hidden.mean(axis=1, where=(tokens != 0)[..., None]))


def _text(review: bytes | str) -> str:
    """Decodes a review; TFDS returns bytes, but its mock data are strings."""
    return review.decode() if isinstance(review, bytes) else str(review)


def make(data_dir: Path | None = None) -> Task:
    """Sentiment of reviews from their first 128 words."""
    splits = {
        split: load_public("imdb_reviews", split, data_dir, limit)
        for split, limit in (("train", None), ("test", _MAX_TEST))
    }
    words = {split: [split_words(_text(row)) for row in rows["text"]] for split, rows in splits.items()}
    vocabulary = Vocabulary(words["train"], _WORDS)

    def encode(split: str) -> Batch:
        rows = np.stack([vocabulary.encode(row, _LENGTH) for row in words[split]])
        rows[:, 0] = np.maximum(rows[:, 0], 1)  # an empty review has one token
        return {"input": rows, "label": splits[split]["label"].astype("int32")}

    return module_task(
        "imdb-transformer",
        lambda rngs: Classifier(len(vocabulary), rngs=rngs),
        CLASSIFICATION,
        encode("train"),
        encode("test"),
        batch_size=32,
    )
