"""Data sets: contents of the embedded ones, and errors of the public ones."""

import importlib.util
import sysconfig

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import interface, stdlib
from experiments.data.builder import is_held_out
from experiments.data.digits import Digits, digit_splits
from experiments.data.loading import load_public, load_split
from experiments.data.scenes import CANVAS, DigitScenes
from experiments.data.vocabulary import PAD, UNKNOWN, Vocabulary, split_words
from experiments.errors import UsageError

SOURCE = '''
"""A module."""
import os.path as p

class Shape(Base):
    def area(self, scale=1.0, *, unit="m", name=None):
        """The area, times a factor.

        More.
        """
        total = p.join(self.side ** 2, other=scale)
        return total

def plain(x):
    """Only a docstring."""
'''


@pytest.mark.parametrize("moment", ["download_and_prepare", "splits"])
def test_two_processes_may_prepare_a_data_set_at_the_same_time(moment, tmp_path, monkeypatch):
    """The second prepares it before, or while, the first does."""
    of_the_first = getattr(Digits, moment)

    def during(self, *args, **kwargs):
        monkeypatch.setattr(Digits, moment, of_the_first)
        load_split(Digits, "test", tmp_path)
        return of_the_first(self, *args, **kwargs)

    monkeypatch.setattr(Digits, moment, during)
    assert load_split(Digits, "test", tmp_path)["image"].shape == (360, 8, 8, 1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return {split: load_split(DigitScenes, split, folder) for split in ("train", "test")}


@pytest.mark.slow
def test_boxes_and_masks_of_a_scene_match_its_digits(scenes):
    assert [len(scene["image"]) for scene in scenes.values()] == [2000, 400]
    digits = digit_splits()
    for split, rows in scenes.items():
        for image, mask, boxes, labels in zip(
            rows["image"][:200], rows["mask"], rows["boxes"], rows["labels"], strict=False
        ):
            assert (labels >= 0).any()
            covered = np.zeros((CANVAS, CANVAS), int)
            for box, label in zip(boxes[labels >= 0].astype(int), labels[labels >= 0], strict=True):
                place = np.s_[box[0] : box[2], box[1] : box[3]]
                covered[place] += 1
                size = box[2] - box[0]
                assert size == box[3] - box[1] and size in (8, 16)
                scale = size // 8
                small = image[place][::scale, ::scale, 0]
                assert set(np.unique(mask[place])) == {0, 1 + label}
                np.testing.assert_array_equal(
                    mask[place] > 0, np.kron(small >= 4, np.ones((scale, scale), bool))
                )
                # The pixels above the background, which is at most 3 of 16, are a digit of this split.
                images, values = digits[split]
                assert any(
                    np.array_equal(small[digit >= 4], digit[digit >= 4]) for digit in images[values == label]
                )
            assert covered.max() == 1 and (mask[covered == 0] == 0).all()
            assert (boxes[labels < 0] == -1).all()
    again = next(iter(DigitScenes().splits()["train"]))
    keys = {image.tobytes() for image in scenes["train"]["image"]}
    assert again["image"].tobytes() in keys  # scenes are deterministic


def test_tokens_have_the_roles_of_the_syntax_tree():
    roles = dict(stdlib.tag(SOURCE))
    assert roles["Shape"] == "class" and roles["Base"] == "read"
    assert roles["area"] == roles["plain"] == "function"
    assert roles["scale"] == "read" and roles["unit"] == roles["x"] == "parameter"
    assert roles["other"] == "argument" and roles["join"] == "method" and roles["side"] == "attribute"
    assert roles["total"] == "read" and roles["os"] == "import"
    assert roles["return"] == roles["<string>"] == roles["**"] == "other"
    assert ("total", "assigned") in stdlib.tag(SOURCE) and ("scale", "parameter") in stdlib.tag(SOURCE)
    assert stdlib.tag("def broken(:") == []
    assert ("é", "parameter") in stdlib.tag("def f(ö, é): pass")  # columns are counted in bytes


def test_formatted_strings_are_one_token_in_every_python_version():
    assert stdlib.tag('x = f"a{b}c"\n')[:3] == [("x", "assigned"), ("=", "other"), ("<string>", "other")]


def test_an_answer_is_the_span_of_the_default_in_the_signature():
    examples = list(stdlib.StdlibDefaults.examples(SOURCE))
    answers = {each["parameter"]: each["signature"][each["start"] : each["end"]] for each in examples}
    assert answers == {"scale": "1.0", "unit": "'m'", "name": "None"}
    assert examples[0]["signature"] == "(self, scale=1.0, unit='m', name=None)"


def test_code_does_not_contain_its_summary():
    (example,) = stdlib.StdlibDocstrings.examples(SOURCE)
    assert example["summary"] == "The area, times a factor."
    assert "factor" not in example["code"] and "self.side ** 2" in example["code"]


def test_chunks_of_text_overlap_by_one_character():
    source = "".join(chr(32 + i % 90) for i in range(2500)) + "é"
    first, second = (bytes(each["text"]).decode() for each in stdlib.StdlibText.examples(source))
    assert first == source[:1025] and second == source[1024:2049]


def test_modules_exclude_the_tests_of_the_standard_library(monkeypatch, tmp_path):
    names = [name for name, _ in stdlib.read_modules()]
    assert {"ast", "json.decoder", "tokenize"} < set(names)
    assert not any("test" in name.split(".") or "site-packages" in name for name in names)
    held_out = [name for name in names if is_held_out(name)]
    assert 0.05 < len(held_out) / len(names) < 0.15
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="0 modules, fewer than 100"):
        list(stdlib.read_modules())


def test_duplicate_examples_are_dropped(monkeypatch):
    body = "\n".join(f"x_{i} = f({i})" for i in range(40))
    monkeypatch.setattr(stdlib, "read_modules", lambda: iter([("abc", body), ("ast", body)]))
    splits = stdlib.StdlibTokens().splits()
    train = list(splits["train"])
    assert len(train) == len(list(stdlib.StdlibTokens.examples(body))) > 3
    assert list(splits["test"]) == []


@pytest.mark.parametrize("language", interface.LANGUAGES)
def test_interface_strings_are_translated_and_splits_do_not_overlap(language, tmp_path):
    splits = {
        split: load_split(interface.InterfaceStrings, split, tmp_path, language)
        for split in ("train", "test")
    }
    english = {split: set(rows["english"]) for split, rows in splits.items()}
    assert len(english["train"]) > 500 and len(english["test"]) > 50
    assert not english["train"] & english["test"]
    pairs = dict(zip(splits["train"]["english"], splits["train"]["translation"], strict=True))
    assert pairs[b"Select All"].decode() in ("Alles auswählen", "Tout sélectionner", "Seleccionar todo")


def test_a_missing_language_pack_is_named_in_the_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install jupyterlab-language-pack-fr-FR"):
        list(interface._pairs("fr_FR"))


def test_a_vocabulary_consists_of_the_most_frequent_words():
    vocabulary = Vocabulary([split_words("b a b"), split_words("c b a")], 6)
    assert vocabulary.words[4:] == ["b", "a"]
    assert vocabulary.encode(["b", "c", "a"], 5).tolist() == [4, UNKNOWN, 5, PAD, PAD]
    assert vocabulary.encode(["b"] * 9, 2).tolist() == [4, 4]


def test_a_public_data_set_is_loaded_by_its_name(tmp_path):
    with tfds.testing.mock_data(num_examples=7):
        rows = load_public("cifar10", "train", tmp_path, limit=5)
    assert rows["image"].shape == (5, 32, 32, 3) and rows["image"].dtype == np.uint8
    assert set(rows["label"]) <= set(range(10))


def test_a_failed_download_explains_the_alternatives(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(UsageError, match=r"cannot prepare 'cifar10'.*no route to host.*TFDS_DATA_DIR"):
        load_public("cifar10", "train", tmp_path)
    with pytest.raises(UsageError, match="has no data set 'cifar11'"):
        load_public("cifar11", "train", tmp_path)
