"""Reads weights of ARC's network from safetensors files and from the file that its authors published."""

from importlib import resources
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from greedylr_jax.arc._network import PUBLISHED, check_weights

_OURS = "arc.safetensors"


def load_weights(path: str | Path | None = None) -> dict[str, jax.Array | np.ndarray]:
    """Reads weights from a safetensors file.

    Args:
      path: the file; None: the weights in the package, whose model card is the file ``arc.md`` beside them.

    Returns:
      A dict from names to float32 arrays.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not a safetensors file, or its arrays do not fit the network.

    Examples:
      >>> sum(array.size for array in load_weights().values())
      9315
      >>> import tempfile, jax, safetensors.numpy
      >>> from greedylr_jax.arc import initial_weights
      >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
      ...     safetensors.numpy.save_file(jax.device_get(initial_weights(jax.random.key(0))), file.name)
      ...     weights = load_weights(file.name)
      >>> sorted(weights) == sorted(load_weights())
      True
    """
    file = resources.files("greedylr_jax.arc") / _OURS if path is None else Path(path)
    content = file.read_bytes()
    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(f"path {str(path)!r} is not a safetensors file: {error}.") from error
    return check_weights(arrays)


def load_keras_weights(path: str | Path) -> dict[str, jax.Array | np.ndarray]:
    """Reads weights from the HDF5 file that the authors of ARC published (``model/arc.h5``); needs h5py.

    Args:
      path: the file.

    Returns:
      A dict from names to float32 arrays.

    Raises:
      ImportError: if h5py is not installed.
      OSError: if the file cannot be read.
      ValueError: if its arrays do not fit the network.

    Examples:
      >>> from greedylr_jax.arc import arc, load_keras_weights
      >>> tx = arc(load_keras_weights("arc.h5"), steps_per_cycle=100)  # doctest: +SKIP

    Source: github.com/fastestimator/ARC (Apache-2.0).
    """
    try:
        import h5py  # noqa: PLC0415  (only this function needs it)
    except ImportError as error:
        raise ImportError('load_keras_weights needs h5py: pip install "greedylr-jax[keras]"') from error
    found: dict[str, jax.Array | np.ndarray] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                # As in "model_weights/lstm/lstm_cell/recurrent_kernel:0".
                parts = name.removesuffix(":0").split("/")
                for layer in dict.fromkeys(parts[:-1]):
                    if f"{layer}/{parts[-1]}" in PUBLISHED.shapes():
                        found[f"{layer}/{parts[-1]}"] = np.asarray(item[()])

        file.visititems(visit)
    return check_weights(found)
