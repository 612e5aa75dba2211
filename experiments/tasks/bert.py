"""Published BERT checkpoints as encoders: the weights in safetensors, by their names on Hugging Face, as the
parameters of :class:`~experiments.tasks.transformer.Transformer`, and the words of ``vocab.txt``.

A checkpoint is a folder with ``model.safetensors``, ``config.json`` and, for the words, ``vocab.txt``, such
as one that was downloaded from Hugging Face. Source: J. Devlin et al., "BERT", 2018. All tokens are of the
first segment: its embedding is added to those of the positions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from flax import nnx

from experiments.errors import UsageError
from experiments.tasks.named import Arrays
from experiments.tasks.transformer import BERT, Transformer

_PREFIXES = ("bert.", "")  # of the encoder in a checkpoint with heads, and in one without
# Names of a layer's linear maps and normalisations here and there.
_LINEAR = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"norm_attention": "attention.output.LayerNorm", "norm_mlp": "output.LayerNorm"}


class Checkpoint(NamedTuple):
    """A BERT checkpoint.

    Attributes:
      make: from random number streams to the encoder, whose parameters ``arrays`` replace.
      arrays: the parameters by their names in the encoder, float32.
      config: of ``config.json``.
    """

    make: Any
    arrays: Arrays
    config: dict[str, Any]


def load_bert(folder: Path) -> Checkpoint:
    """Reads a BERT checkpoint.

    Args:
      folder: with ``model.safetensors`` and ``config.json``.

    Raises:
      UsageError: if a file or an array is missing, or the network is of another kind.

    Examples:
      The features of a batch of token indices, shape (batch, length, width)::

        checkpoint = load_bert(Path("bert-base-uncased"))
        network = make_network(checkpoint.make)
        hidden = network.module(checkpoint.arrays)(tokens, padding_mask(tokens))
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"cannot read a BERT checkpoint from {folder}: {error}") from error
    if config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{folder}: hidden_act must be 'gelu', got {config['hidden_act']!r}")

    def make(rngs: nnx.Rngs) -> Transformer:
        width = config["hidden_size"]
        return Transformer(
            config["vocab_size"],
            config["max_position_embeddings"],
            width,
            config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            expansion=config["intermediate_size"] // width,
            style=BERT._replace(epsilon=config.get("layer_norm_eps", BERT.epsilon)),
            rngs=rngs,
        )

    try:
        arrays = convert(stored, config["num_hidden_layers"], config["num_attention_heads"])
    except KeyError as error:
        raise UsageError(f"{folder}: model.safetensors has no array {error}") from error
    return Checkpoint(make, arrays, config)


def convert(stored: Arrays, layers: int, heads: int) -> Arrays:
    """The parameters of the encoder from the arrays of a checkpoint; heads and pooler are ignored."""
    prefix = next((each for each in _PREFIXES if f"{each}embeddings.word_embeddings.weight" in stored), "")

    def get(name: str) -> np.ndarray:
        return np.asarray(stored[prefix + name], np.float32)

    def norm(here: str, there: str) -> Arrays:
        # Old checkpoints have the names of TensorFlow.
        scale, bias = ("gamma", "beta") if f"{prefix}{there}.gamma" in stored else ("weight", "bias")
        return {f"{here}.scale": get(f"{there}.{scale}"), f"{here}.bias": get(f"{there}.{bias}")}

    embeddings = "embeddings."
    positions = get(embeddings + "position_embeddings.weight")
    arrays = {
        "tokens.embedding": get(embeddings + "word_embeddings.weight"),
        "positions.embedding": positions + get(embeddings + "token_type_embeddings.weight")[0],
        **norm("norm", embeddings + "LayerNorm"),
    }
    for layer in range(layers):
        here, there = f"layers.{layer}.", f"encoder.layer.{layer}."
        for own, name in _LINEAR.items():
            kernel, bias = get(f"{there}{name}.weight").T, get(f"{there}{name}.bias")
            if own in ("attention.query", "attention.key", "attention.value"):
                kernel, bias = kernel.reshape(len(kernel), heads, -1), bias.reshape(heads, -1)
            elif own == "attention.out":
                kernel = kernel.reshape(heads, -1, kernel.shape[1])
            arrays |= {f"{here}{own}.kernel": kernel, f"{here}{own}.bias": bias}
        for own, name in _NORMS.items():
            arrays |= norm(here + own, there + name)
    return arrays


class WordPieces:
    """The vocabulary of a checkpoint, which splits words into its longest known pieces from the left."""

    def __init__(self, words: Sequence[str]):
        """Takes the lines of ``vocab.txt``; pieces after the first of a word start with ``##``."""
        self.words = list(words)
        self._index = {word: index for index, word in enumerate(self.words)}
        self.unknown = self._index["[UNK]"]

    @classmethod
    def read(cls, path: Path) -> "WordPieces":
        """The words of ``vocab.txt``, one per line."""
        return cls(path.read_text(encoding="utf-8").splitlines())

    def pieces(self, word: str) -> list[int]:
        """The pieces of a word in lower case; the unknown word if there are none.

        Examples:
          >>> WordPieces(["[UNK]", "un", "##known", "##k"]).pieces("unknown")
          [1, 2]
          >>> WordPieces(["[UNK]", "un"]).pieces("known")
          [0]
        """
        found, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self._index), None)
            if end is None:
                return [self.unknown]
            found.append(self._index[mark + word[start:end]])
            start = end
        return found
