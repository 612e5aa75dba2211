"""From a TFDS builder to arrays in memory, through ``as_data_source`` (no TensorFlow)."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder
from experiments.errors import UsageError


def load_split(
    builder_class: type[EmbeddedBuilder], split: str, data_dir: Path | None = None, config: str | None = None
) -> dict[str, np.ndarray]:
    """Prepares an embedded data set once and returns one split of it, a stacked array for each feature.

    Args:
      builder_class: the builder.
      split: its split, such as ``"train"``.
      data_dir: where prepared data sets are kept; None: TFDS's own folder (``TFDS_DATA_DIR``).
      config: the builder's configuration, such as a language; None: its only or first one.

    Returns:
      A dict from feature names to arrays with the example as the leading axis, in a fixed order. Text is an
      array of ``bytes`` objects.

    Examples:
      >>> import tempfile
      >>> from experiments.data.digits import Digits
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     test = load_split(Digits, "test", folder)
      >>> test["image"].shape, sorted(test)
      ((360, 8, 8, 1), ['image', 'label'])
    """
    with _quietly():
        builder = builder_class(data_dir=data_dir, file_format="array_record", config=config)
        builder.download_and_prepare()
    return _stack(builder, split)


def load_public(
    name: str, split: str, data_dir: Path | None = None, limit: int | None = None
) -> dict[str, np.ndarray]:
    """Returns one split of a public data set by its TFDS name; it is downloaded once, if it is not there yet.

    Args:
      name: the name in the TFDS catalog, such as ``"cifar10"``.
      split: its split, such as ``"train"``.
      data_dir: as in :func:`load_split`.
      limit: examples at most; None: all.

    Returns:
      As :func:`load_split`.

    Raises:
      UsageError: if TFDS knows no such data set, or it cannot be downloaded.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UsageError(f"TensorFlow Datasets knows no data set {name!r}") from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # what a failed download raises differs from set to set
        raise UsageError(
            f"cannot prepare {name!r} in {builder.data_dir}: {type(error).__name__}: {error}. Public data "
            "sets are downloaded once and need a network; where there is none, copy the prepared folder from "
            "another machine, set TFDS_DATA_DIR to its parent, or take an embedded task "
            "(python -m experiments tasks)"
        ) from error
    return _stack(builder, split, limit)


def _stack(builder: tfds.core.DatasetBuilder, split: str, limit: int | None = None) -> dict[str, Any]:
    source = builder.as_data_source(split=split)
    records = [source[index] for index in range(len(source) if limit is None else min(limit, len(source)))]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # The embedded builders write in seconds; what TFDS prints would only break up the program's own.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
