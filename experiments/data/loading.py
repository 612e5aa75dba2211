"""From a TFDS builder to arrays in memory, through ``as_data_source`` (no TensorFlow)."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


def load_split(
    builder_class: type[tfds.core.GeneratorBasedBuilder], split: str, data_dir: Path | None = None
) -> dict[str, np.ndarray]:
    """Prepares a data set once and returns one split of it, a stacked array for each feature.

    Args:
      builder_class: the builder.
      split: its split, such as ``"train"``.
      data_dir: where prepared data sets are kept; None: TFDS's own folder (``TFDS_DATA_DIR``).

    Returns:
      A dict from feature names to arrays with the example as the leading axis, in a fixed order.

    Examples:
      >>> import tempfile
      >>> from experiments.data.digits import Digits
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     test = load_split(Digits, "test", folder)
      >>> test["image"].shape, sorted(test)
      ((360, 8, 8, 1), ['image', 'label'])
    """
    with _quietly():
        builder = builder_class(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    records = list(builder.as_data_source(split=split))
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # The builders here write in under a second; what TFDS prints would only break up the program's own.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
