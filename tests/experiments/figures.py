"""Checks of figures by their data and their pixels."""

from pathlib import Path

import matplotlib.image
import numpy as np


def lines_of(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The data of the labelled lines of some axes, by label."""
    return {
        line.get_label(): (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def assert_is_drawn(path: Path, colors: int = 1) -> None:
    """Fails unless the picture has ``colors`` saturated colours on a background that is mostly white."""
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) > 300
    background = (image == 1).all(axis=-1).mean()
    assert 0.2 < background < 0.999, f"{path.name}: {background:.1%} of the pixels are white"
    saturated = image[np.ptp(image, axis=-1) > 0.3]
    drawn, counts = np.unique((saturated * 15).round(), axis=0, return_counts=True)
    assert (counts > 20).sum() >= colors, f"{path.name} shows {len(drawn)} colours"
