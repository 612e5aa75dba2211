"""Pretraining: networks that fine-tuning starts from, and what each of them is trained on.

An encoder learns masked language modelling (J. Devlin et al., "BERT", 2018) and a decoder causal language
modelling (A. Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018) on the
words of the standard library's source; a residual network learns five of the ten digits. Held-out modules and
images are not trained on, so that they remain held out for fine-tuning.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.stdlib import StdlibText
from experiments.data.vocabulary import Vocabulary, split_words
from experiments.tasks.base import CLASSIFICATION, Batch, Collector, Objective, Params, Task
from experiments.tasks.images import load_digits
from experiments.tasks.language import TransformerModel
from experiments.tasks.named import make_network, network_task
from experiments.tasks.resnet import ResNet
from experiments.tasks.tagging import Tagger
from experiments.tasks.transformer import Transformer

KINDS = ("encoder", "decoder", "image")
CLASSES = 5  # digits 0 to 4 for pretraining, 5 to 9 for fine-tuning
_MASKED = 0.15  # share of the words of a window
_TEST_WINDOWS = 256
_SPECIAL = 4  # the first words of a vocabulary, which do not replace others


class Size(NamedTuple):
    """The networks of a preset and their pretraining.

    Attributes:
      words: maximum number of words of the vocabulary.
      length: words in a window.
      width: features of a word.
      layers: of the encoder and of the decoder.
      channels: of the image network's first stage.
      steps: of the encoder and of the decoder.
      image_steps: of the image network.
      batch_size: windows or images in a step.
      learning_rate: the maximum, of AdamW, after a warm-up of 5% of the steps and before a cosine decay to 0.
    """

    words: int
    length: int
    width: int
    layers: int
    channels: int
    steps: int
    image_steps: int
    batch_size: int
    learning_rate: float


SIZES: dict[str, Size] = {
    # For tests; the resulting networks are useless.
    "tiny": Size(200, 32, 16, 1, 4, 20, 20, 8, 3e-3),
    "quick": Size(1500, 48, 48, 2, 8, 800, 200, 16, 3e-3),
    "full": Size(8000, 128, 256, 6, 32, 20_000, 1000, 32, 6e-4),
}


class Corpus(NamedTuple):
    """The words of the standard library."""

    vocabulary: Vocabulary
    windows: dict[str, np.ndarray]  # by split; shape=(windows, length + 1); consecutive windows share a word


@functools.cache
def load_corpus(size: Size, data_dir: Path | None) -> Corpus:
    """The words of each split in windows; the vocabulary is that of the training split."""
    texts = {split: load_split(StdlibText, split, data_dir)["text"] for split in ("train", "test")}
    # Consecutive chunks of a module share a character.
    words = {
        split: split_words(chunks[:, :-1].tobytes().decode("ascii", "replace"))
        for split, chunks in texts.items()
    }
    vocabulary = Vocabulary([words["train"]], size.words)
    return Corpus(
        vocabulary, {split: _windows(vocabulary.indices(own), size.length) for split, own in words.items()}
    )


def _windows(indices: list[int], length: int) -> np.ndarray:
    count = (len(indices) - 1) // length
    first = np.asarray(indices[: count * length], np.int32).reshape(count, length)
    following = np.asarray(indices[length : count * length + 1 : length], np.int32)
    return np.concatenate([first, following[:, None]], axis=1)


def make_task(kind: str, preset: str, name: str | None = None, data_dir: Path | None = None) -> Task:
    """The task that a network is pretrained on.

    Args:
      kind: one of :data:`KINDS`.
      preset: key of :data:`SIZES`.
      name: of the task; None: the kind and the preset.
      data_dir: of prepared data sets; None: TFDS's default.
    """
    name, size = name or f"{kind}-{preset}", SIZES[preset]
    if kind == "image":
        return _make_image(name, size, data_dir)
    corpus = load_corpus(size, data_dir)
    return (_make_encoder if kind == "encoder" else _make_decoder)(name, size, corpus)


def make(name: str, kind: str, preset: str, data_dir: Path | None = None) -> Task:
    """:func:`make_task` with the arguments of a registered task."""
    return make_task(kind, preset, name, data_dir)


def make_transformer(size: Size, rngs: nnx.Rngs, **options: bool) -> Transformer:
    """The transformer of a size; its last word is the mask."""
    return Transformer(size.words + 1, size.length, size.width, size.layers, rngs=rngs, **options)


def mask_words(key: jax.Array, windows: jax.Array, words: int) -> Batch:
    """Masks 15% of the words of each window.

    Args:
      key: of the random choices.
      windows: shape (batch, length).
      words: number of words; this index is the mask.

    Returns:
      ``positions`` of the chosen words, shape (batch, chosen), the words there as ``label``, and ``input``,
      in which 80% of them are masked and 10% are random words.
    """
    keys = jax.random.split(key, 3)
    windows = jnp.asarray(windows)
    chosen = max(1, round(_MASKED * windows.shape[1]))
    positions = jax.lax.top_k(jax.random.uniform(keys[0], windows.shape), chosen)[1]
    labels = jnp.take_along_axis(windows, positions, axis=1)
    kind = jax.random.uniform(keys[1], labels.shape)
    random = jax.random.randint(keys[2], labels.shape, _SPECIAL, words)
    shown = jnp.where(kind < 0.8, words, jnp.where(kind < 0.9, random, labels))
    rows = jnp.arange(len(windows))[:, None]
    return {"input": windows.at[rows, positions].set(shown), "positions": positions, "label": labels}


def _logits_loss(module: Tagger, batch: Batch) -> jax.Array:
    logits = module(batch["input"], batch["positions"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


def _logits_accuracy(module: Tagger, batch: Batch) -> jax.Array:
    logits = module(batch["input"], batch["positions"])
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])


# Integer labels of the words at some positions.
AT_POSITIONS = Objective(_logits_loss, _logits_accuracy, "accuracy")


def _make_encoder(name: str, size: Size, corpus: Corpus) -> Task:
    def collect(key: jax.Array, params: Params, batch: Batch) -> tuple[jax.Array, Batch]:
        key, own = jax.random.split(key)
        return key, mask_words(own, batch["input"], size.words)

    mask = jax.jit(mask_words, static_argnums=2)
    test = mask(jax.random.key(0), corpus.windows["test"][:_TEST_WINDOWS, :-1], size.words)
    return network_task(
        name,
        make_network(lambda rngs: Tagger(make_transformer(size, rngs), size.words, rngs=rngs)),
        AT_POSITIONS,
        {"input": corpus.windows["train"][:, :-1]},
        jax.device_get(test),
        size.batch_size,
        collector=Collector(lambda key, params: key, collect),
    )


def _make_decoder(name: str, size: Size, corpus: Corpus) -> Task:
    def split(windows: np.ndarray) -> Batch:
        return {"input": windows[:, :-1], "label": windows[:, 1:]}

    return network_task(
        name,
        make_network(lambda rngs: TransformerModel(make_transformer(size, rngs), rngs=rngs)),
        CLASSIFICATION,
        split(corpus.windows["train"]),
        split(corpus.windows["test"][:_TEST_WINDOWS]),
        size.batch_size,
    )


def make_resnet(size: Size, rngs: nnx.Rngs) -> ResNet:
    """The image network of a size, with five classes."""
    return ResNet(1, CLASSES, width=size.channels, stages=2, blocks=1, rngs=rngs)


def load_digit_classes(split: str, first: int, data_dir: Path | None) -> Batch:
    """The images of five digits from ``first`` on, labelled from 0 on."""
    examples = load_digits(split, data_dir)
    rows = (examples["label"] >= first) & (examples["label"] < first + CLASSES)
    return {"input": examples["input"][rows], "label": examples["label"][rows] - np.int32(first)}


def _make_image(name: str, size: Size, data_dir: Path | None) -> Task:
    splits = (load_digit_classes(split, 0, data_dir) for split in ("train", "test"))
    return network_task(
        name, make_network(lambda rngs: make_resnet(size, rngs)), CLASSIFICATION, *splits, size.batch_size
    )
