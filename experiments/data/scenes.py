"""Digit scenes: one to four digits on a 32x32 canvas, with the class of every pixel and a box for each digit.

Digits keep their size (8 pixels) or are doubled, never overlap, and lie on a noisy background. The scenes of
a split are made of digits of the same split.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder, Example
from experiments.data.digits import digit_splits

CANVAS, MAX_DIGITS = 32, 4
_SIZES = {"train": 2000, "test": 400}
_TRIES = 20  # places tried for a digit before the scene does without it
_INK = 4  # of 16, from which a pixel belongs to its digit
_NOISE = 3  # of 16, the greatest value of the background


class DigitScenes(EmbeddedBuilder):
    """Digits pasted on a larger canvas, for segmentation and detection."""

    def features(self) -> dict[str, Any]:
        """Pixels from 0 to 16; their classes, 0 for background; boxes and labels, -1 where there is none."""
        tensor = tfds.features.Tensor
        return {
            "image": tensor(shape=(CANVAS, CANVAS, 1), dtype=np.uint8),
            "mask": tensor(shape=(CANVAS, CANVAS), dtype=np.uint8),
            "boxes": tensor(shape=(MAX_DIGITS, 4), dtype=np.float32),  # top, left, bottom, right; pixels
            "labels": tensor(shape=(MAX_DIGITS,), dtype=np.int32),
        }

    def splits(self) -> dict[str, Iterable[Example]]:
        """2,000 scenes to train with, 400 held out."""
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
        taken = np.zeros((CANVAS, CANVAS), bool)
        boxes = np.full((MAX_DIGITS, 4), -1, np.float32)
        labels = np.full(MAX_DIGITS, -1, np.int32)
        for slot in range(rng.integers(1, MAX_DIGITS + 1)):
            chosen, scale = rng.integers(len(digits)), rng.integers(1, 3)
            digit = np.kron(images[chosen], np.ones((scale, scale), np.uint8))
            size = len(digit)
            for _ in range(_TRIES):
                top, left = rng.integers(0, CANVAS - size + 1, 2)
                place = np.s_[top : top + size, left : left + size]
                if not taken[place].any():
                    taken[place] = True
                    canvas[place] = np.maximum(canvas[place], digit)
                    mask[place][digit >= _INK] = 1 + digits[chosen]
                    boxes[slot] = top, left, top + size, left + size
                    labels[slot] = digits[chosen]
                    break
        yield {"image": canvas[..., None], "mask": mask, "boxes": boxes, "labels": labels}
