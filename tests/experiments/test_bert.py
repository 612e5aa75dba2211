"""Published BERT checkpoints: the encoder computes what a NumPy implementation of BERT computes."""

import json

import numpy as np
import pytest

from experiments.errors import UsageError
from experiments.tasks.bert import WordPieces, load_bert
from experiments.tasks.named import make_network
from experiments.tasks.transformer import padding_mask
from tests.experiments.bert_reference import CONFIG, forward, random_arrays, write_checkpoint

TOKENS = np.array([[2, 7, 5, 29, 3, 11], [4, 4, 9, 0, 0, 0]])


def features(folder):
    checkpoint = load_bert(folder)
    network = make_network(checkpoint.make)
    assert network.shapes == {name: array.shape for name, array in checkpoint.arrays.items()}
    return np.asarray(network.module(checkpoint.arrays)(TOKENS, padding_mask(TOKENS)))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_the_encoder_computes_the_features_of_bert(prefix, tmp_path):
    """For a checkpoint of BertModel, and of a model with heads and the old names of normalisations."""
    arrays = random_arrays()
    stored = {prefix + name: array for name, array in arrays.items()}
    if prefix:
        stored = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): array
            for name, array in stored.items()
        }
        stored["cls.predictions.bias"] = np.zeros(30, np.float32)
    write_checkpoint(tmp_path, stored)
    got, expected = features(tmp_path), forward(arrays, TOKENS)
    is_word = TOKENS != 0
    np.testing.assert_allclose(got[is_word], expected[is_word], atol=2e-5)


def test_a_missing_array_is_named(tmp_path):
    arrays = random_arrays()
    del arrays["encoder.layer.1.output.dense.bias"]
    write_checkpoint(tmp_path, arrays)
    with pytest.raises(UsageError, match=r"no array 'encoder\.layer\.1\.output\.dense\.bias'"):
        load_bert(tmp_path)


def test_another_activation_is_refused(tmp_path):
    write_checkpoint(tmp_path, random_arrays(), CONFIG | {"hidden_act": "relu"})
    with pytest.raises(UsageError, match="hidden_act must be 'gelu', got 'relu'"):
        load_bert(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="cannot read a BERT checkpoint"):
        load_bert(tmp_path)


def test_words_are_split_into_the_longest_pieces(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "play", "##ing", "##in", "##g", "pl"]))
    words = WordPieces.read(path)
    assert words.pieces("playing") == [2, 3]
    assert words.pieces("pling") == [6, 3]
    assert words.pieces("plain") == [1]
    assert json.loads(json.dumps(words.words))[words.unknown] == "[UNK]"
