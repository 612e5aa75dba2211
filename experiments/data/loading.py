"""Loads TFDS data sets into NumPy arrays through ``as_data_source`` (no TensorFlow)."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder
from experiments.errors import UsageError


def load_split(
    builder_class: type[EmbeddedBuilder], split: str, data_dir: Path | None = None, config: str | None = None
) -> dict[str, np.ndarray]:
    """Loads one split of an embedded data set, and prepares the data set on the first call.

    Args:
      builder_class: the builder.
      split: name of the split, such as ``"train"``.
      data_dir: folder of prepared data sets; None: TFDS's default (``TFDS_DATA_DIR``).
      config: name of the builder's configuration, such as a language; None: the first one.

    Returns:
      A dict from feature names to arrays whose leading axis is the example, in a fixed order. Text is an
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
        builder = _prepare(
            lambda: builder_class(data_dir=data_dir, file_format="array_record", config=config)
        )
    return _stack(builder, split)


def load_public(
    name: str, split: str, data_dir: Path | None = None, limit: int | None = None
) -> dict[str, np.ndarray]:
    """Loads one split of a public data set, and downloads the data set on the first call.

    Args:
      name: name in the TFDS catalog, such as ``"cifar10"``.
      split: name of the split, such as ``"train"``.
      data_dir: as in :func:`load_split`.
      limit: maximum number of examples; None: all.

    Returns:
      As :func:`load_split`.

    Raises:
      UsageError: if TFDS has no such data set, or it cannot be downloaded.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UsageError(f"TensorFlow Datasets has no data set {name!r}") from error
    try:
        builder = _prepare(lambda: tfds.builder(name, data_dir=data_dir, file_format="array_record"))
    except Exception as error:  # builders raise different exceptions for a failed download
        raise UsageError(
            f"cannot prepare {name!r} in {builder.data_dir}: {type(error).__name__}: {error}. Public data "
            "sets are downloaded on first use. Without a network connection, copy the prepared folder from "
            "another machine and set TFDS_DATA_DIR to its parent, or use an embedded task "
            "(python -m experiments tasks)"
        ) from error
    return _stack(builder, split, limit)


def _prepare(make_builder: Callable[[], tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
    """A builder whose data set is prepared, by this process or by another one at the same time."""
    builder = make_builder()
    try:
        builder.download_and_prepare()
    except OSError:
        # TFDS prepares in a folder of its own, which it cannot rename if another process was first.
        if not builder.data_path.exists():
            raise
    return make_builder()  # which reads what has been prepared


def _stack(builder: tfds.core.DatasetBuilder, split: str, limit: int | None = None) -> dict[str, Any]:
    source = builder.as_data_source(split=split)
    records = [source[index] for index in range(len(source) if limit is None else min(limit, len(source)))]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses TFDS's output: embedded data sets are prepared within seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
