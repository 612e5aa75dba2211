"""MNIST-1D: one-dimensional signals of length 40 in ten classes, 4,000 training and 1,000 test examples.

Source: S. Greydanus and D. Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024. The package
``mnist1d`` generates the published examples without a download.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from mnist1d.data import get_dataset_args, make_dataset

from experiments.data.builder import EmbeddedBuilder, Example


class Mnist1d(EmbeddedBuilder):
    """The published 4,000 training and 1,000 test examples."""

    def features(self) -> dict[str, Any]:
        """The signal, and the digit that it represents."""
        return {
            "signal": tfds.features.Tensor(shape=(40,), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
        }

    def splits(self) -> dict[str, Iterable[Example]]:
        """The published splits."""
        state = np.random.get_state()  # noqa: NPY002  (the package seeds NumPy's global generator)
        try:
            examples = make_dataset(get_dataset_args())
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return {
            split: (
                {"signal": signal.astype(np.float32), "label": int(label)}
                for signal, label in zip(examples["x" + suffix], examples["y" + suffix], strict=True)
            )
            for split, suffix in (("train", ""), ("test", "_test"))
        }
