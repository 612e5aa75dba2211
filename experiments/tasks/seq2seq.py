"""Translation and summarisation by an encoder-decoder transformer over words."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.interface import InterfaceStrings
from experiments.data.loading import load_split
from experiments.data.stdlib import StdlibDocstrings
from experiments.data.vocabulary import END, PAD, START, Vocabulary, split_words
from experiments.tasks.base import Batch, Objective, Task, module_task
from experiments.tasks.text_scores import bleu_score
from experiments.tasks.transformer import Transformer, causal_mask, padding_mask

_WIDTH, _LAYERS = 48, 2
_MAX_TEST = 500


class EncoderDecoder(nnx.Module):
    """An encoder-decoder transformer with separate source and target vocabularies."""

    def __init__(self, encoder: Transformer, decoder: Transformer, *, rngs: nnx.Rngs):
        self.encoder, self.decoder = encoder, decoder
        self.logits = nnx.Linear(decoder.width, decoder.tokens.num_embeddings, rngs=rngs)

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """Logits of each next target word, shape (batch, target length, words)."""
        mask = padding_mask(source)
        encoded = self.encoder(source, mask)
        return self.logits(self.decoder(target, causal_mask(target), encoded, mask))


def word_loss(logits: jax.Array, words: jax.Array) -> jax.Array:
    """Mean cross-entropy of the words, without padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, words)
    weights = words != PAD
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)


def word_accuracy(logits: jax.Array, words: jax.Array) -> jax.Array:
    """Fraction of words predicted correctly from the correct previous words (teacher forcing)."""
    weights = words != PAD
    is_correct = (jnp.argmax(logits, axis=-1) == words) & weights
    return jnp.sum(is_correct) / jnp.maximum(jnp.sum(weights), 1)


def _next_words(module: EncoderDecoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Logits of each next word of the target, and these words."""
    return module(batch["source"], batch["target"][:, :-1]), batch["target"][:, 1:]


OBJECTIVE = Objective(
    lambda module, batch: word_loss(*_next_words(module, batch)),
    lambda module, batch: word_accuracy(*_next_words(module, batch)),
    "token accuracy",
)


def encode_target(vocabulary: Vocabulary, words: Sequence[str], length: int) -> np.ndarray:
    """START, at most ``length`` - 1 words, END, and padding, shape (length + 1,), int32."""
    row = np.concatenate([[START], vocabulary.encode(words, length)]).astype(np.int32)
    row[min(len(words), length - 1) + 1] = END
    return row


def _make(
    name: str,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    words: tuple[int, int],
    lengths: tuple[int, int],
    batch_size: int,
) -> Task:
    """Builds a task from the source and target texts of each split."""
    texts = {
        split: [[split_words(text.decode()) for text in column] for column in columns]
        for split, columns in pairs.items()
    }
    vocabularies = [Vocabulary(column, size) for column, size in zip(texts["train"], words, strict=True)]
    splits = {}
    for split, (sources, targets) in texts.items():
        splits[split] = {
            "source": np.stack([vocabularies[0].encode(source, lengths[0]) for source in sources]),
            "target": np.stack([encode_target(vocabularies[1], target, lengths[1]) for target in targets]),
        }
    splits["test"] = {key: rows[:_MAX_TEST] for key, rows in splits["test"].items()}
    sizes = tuple(map(len, vocabularies))

    def module(rngs: nnx.Rngs) -> EncoderDecoder:
        encoder = Transformer(sizes[0], lengths[0], _WIDTH, _LAYERS, rngs=rngs)
        decoder = Transformer(sizes[1], lengths[1], _WIDTH, _LAYERS, cross=True, rngs=rngs)
        return EncoderDecoder(encoder, decoder, rngs=rngs)

    return module_task(
        name,
        module,
        OBJECTIVE,
        splits["train"],
        splits["test"],
        batch_size=batch_size,
        text=bleu_score(vocabularies[1], texts["test"][1][:_MAX_TEST], lengths[1]),
    )


def make_translation(language: str, data_dir: Path | None = None) -> Task:
    """Translation of interface strings of at most 16 words from English."""
    splits = {split: load_split(InterfaceStrings, split, data_dir, language) for split in ("train", "test")}
    pairs = {split: (rows["english"], rows["translation"]) for split, rows in splits.items()}
    return _make(f"translation-{language}", pairs, (800, 800), (16, 16), batch_size=16)


def make_summarization(data_dir: Path | None = None) -> Task:
    """Summarisation of a function (its first 64 words) as the first line of its docstring (16 words)."""
    splits = {split: load_split(StdlibDocstrings, split, data_dir) for split in ("train", "test")}
    pairs = {split: (rows["code"], rows["summary"]) for split, rows in splits.items()}
    return _make("summarization", pairs, (1000, 1000), (64, 16), batch_size=8)
