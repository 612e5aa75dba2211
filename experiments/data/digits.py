"""Handwritten digits: 1,797 images of 8x8 pixels, from scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test part).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data.builder import EmbeddedBuilder, Example


def digit_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (uint8, 0 to 16, shape (n, 8, 8)) and labels of each split; the test split is a fifth.

    Examples:
      >>> {name: images.shape for name, (images, labels) in digit_splits().items()}
      {'train': (1437, 8, 8), 'test': (360, 8, 8)}
    """
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    images = digits.images.astype(np.uint8)
    return {"train": (images[train], digits.target[train]), "test": (images[test], digits.target[test])}


class Digits(EmbeddedBuilder):
    """The digits with a fixed, stratified fifth held out as the test split."""

    def features(self) -> dict[str, Any]:
        """Pixels from 0 to 16, and the digit."""
        return {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }

    def splits(self) -> dict[str, Iterable[Example]]:
        """1,437 training and 360 test examples."""
        return {
            name: (
                {"image": image[..., None], "label": int(label)} for image, label in zip(*split, strict=True)
            )
            for name, split in digit_splits().items()
        }
