"""Digit scenes: one to four digits on a 32x32 canvas, with the class of every pixel and a box for each digit.

Digits are 8 or 16 pixels wide and do not overlap; the background is noise. The scenes of a split consist of
digits of the same split.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder, Example
from experiments.data.digits import digit_splits

CANVAS, MAX_DIGITS = 32, 4
_SIZES = {"train": 2000, "test": 400}
_TRIES = 20  # attempts to place a digit before it is left out
_INK = 4  # minimum value, of 16, of a pixel that belongs to the digit
_NOISE = 3  # maximum value, of 16, of the background


class DigitScenes(EmbeddedBuilder):
    """Digits pasted on a larger canvas, for segmentation and detection."""

    def features(self) -> dict[str, Any]:
        """Pixels from 0 to 16; their classes, 0 for the background; boxes and labels, padded with -1."""
        tensor = tfds.features.Tensor
        return {
            "image": tensor(shape=(CANVAS, CANVAS, 1), dtype=np.uint8),
            "mask": tensor(shape=(CANVAS, CANVAS), dtype=np.uint8),
            "boxes": tensor(shape=(MAX_DIGITS, 4), dtype=np.float32),  # top, left, bottom, right; pixels
            "labels": tensor(shape=(MAX_DIGITS,), dtype=np.int32),
        }

    def splits(self) -> dict[str, Iterable[Example]]:
        """2,000 training and 400 test scenes."""
        return {
            name: _scenes(*split, _SIZES[name], np.random.default_rng(index))
            for index, (name, split) in enumerate(digit_splits().items())
        }


def _scenes(
    images: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[Example]:
    for _ in range(count):
        canvas = rng.integers(0, _NOISE + 1, (CANVAS, CANVAS)).astype(np.uint8)
        mask = np.zeros((CANVAS, CANVAS), np.uint8)
        is_occupied = np.zeros((CANVAS, CANVAS), bool)
        boxes = np.full((MAX_DIGITS, 4), -1, np.float32)
        labels = np.full(MAX_DIGITS, -1, np.int32)
        for slot in range(rng.integers(1, MAX_DIGITS + 1)):
            chosen, scale = rng.integers(len(digits)), rng.integers(1, 3)
            digit = np.kron(images[chosen], np.ones((scale, scale), np.uint8))
            size = len(digit)
            for _ in range(_TRIES):
                top, left = rng.integers(0, CANVAS - size + 1, 2)
                place = np.s_[top : top + size, left : left + size]
                if not is_occupied[place].any():
                    is_occupied[place] = True
                    canvas[place] = np.maximum(canvas[place], digit)
                    mask[place][digit >= _INK] = 1 + digits[chosen]
                    boxes[slot] = top, left, top + size, left + size
                    labels[slot] = digits[chosen]
                    break
        yield {"image": canvas[..., None], "mask": mask, "boxes": boxes, "labels": labels}
