"""Translations of JupyterLab's interface from English to German, French or Spanish.

Source: the packages ``jupyterlab-language-pack-*``, translated by the Jupyter community on Crowdin (BSD
licence).
"""

import gettext
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder, Example, is_held_out
from experiments.errors import UsageError

LANGUAGES = {"de": "de_DE", "fr": "fr_FR", "es": "es_ES"}


class InterfaceStrings(EmbeddedBuilder):
    """Strings of a user interface and their translations; the split depends on the English string only."""

    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=language) for language in LANGUAGES]

    def features(self) -> dict[str, Any]:
        """A string in both languages."""
        return {"english": tfds.features.Text(), "translation": tfds.features.Text()}

    def splits(self) -> dict[str, Iterable[Example]]:
        """About one string in ten is in the test split."""
        pairs = dict(_pairs(LANGUAGES[self.builder_config.name]))
        return {
            "train": [_example(pair) for pair in pairs.items() if not is_held_out(pair[0])],
            "test": [_example(pair) for pair in pairs.items() if is_held_out(pair[0])],
        }


def _example(pair: tuple[str, str]) -> Example:
    return {"english": pair[0], "translation": pair[1]}


def _pairs(locale: str) -> Iterator[tuple[str, str]]:
    package = f"jupyterlab_language_pack_{locale}"
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise UsageError(f"the translation tasks require the package {name}; run: pip install {name}")
    for catalog in sorted(Path(spec.origin).parent.rglob("*.mo")):
        with catalog.open("rb") as file:
            translations = gettext.GNUTranslations(file)
        # gettext has no public method that lists the strings of a catalog.
        for english, translation in translations._catalog.items():
            if isinstance(english, str) and english and translation and english != translation:
                yield english.split("\x04")[-1], translation  # drop the context
