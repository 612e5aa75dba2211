"""MNIST-1D: ten classes of noisy one-dimensional shapes, 40 numbers each, 4,000 + 1,000 of them.

Source: S. Greydanus and D. Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024. The package
``mnist1d`` makes the published examples from their templates, without a download.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from mnist1d.data import get_dataset_args, make_dataset


class Mnist1d(tfds.core.GeneratorBasedBuilder):
    """The published 4,000 training and 1,000 test examples."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "signal": tfds.features.Tensor(shape=(40,), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("signal", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # nothing to download
        state = np.random.get_state()  # noqa: NPY002  (the package seeds NumPy's global generator)
        try:
            made = make_dataset(get_dataset_args())
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return {
            "train": self._generate_examples(made["x"], made["y"]),
            "test": self._generate_examples(made["x_test"], made["y_test"]),
        }

    def _generate_examples(
        self, signals: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (signal, label) in enumerate(zip(signals, labels, strict=True)):
            yield index, {"signal": signal.astype(np.float32), "label": int(label)}
