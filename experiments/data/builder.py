"""The base class of the embedded data sets: TFDS builders that read installed packages."""

import abc
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

Example = dict[str, Any]


class EmbeddedBuilder(tfds.core.GeneratorBasedBuilder):
    """A data set that is generated locally, without a download. Its docstring is the TFDS description."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    @abc.abstractmethod
    def features(self) -> dict[str, Any]:
        """The TFDS features of an example."""

    @abc.abstractmethod
    def splits(self) -> dict[str, Iterable[Example]]:
        """The examples of each split, in a fixed order."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(self.features()),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # nothing to download
        return {name: self._generate_examples(examples) for name, examples in self.splits().items()}

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[int, Example]]:
        yield from enumerate(examples)


def is_held_out(name: str) -> bool:
    """Whether the item of this name belongs to the test split: about one in ten, the same on every machine.

    Examples:
      >>> sum(is_held_out(str(number)) for number in range(1000))
      83
    """
    return zlib.crc32(name.encode()) % 10 == 0
