"""Parts of figures that all studies share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files only and needs no display

import matplotlib.pyplot as plt
import numpy as np

from experiments.reporting.palette import (  # noqa: F401  (figures use them as drawing.BLUE)
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    VIOLET,
    Look,
)
from experiments.training.store import write_atomically


def panels(
    count: int, columns: int, *, width: float = 4.4, height: float = 3.4, **options: object
) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with a grid of ``count`` axes; the unused cells of the grid are invisible.

    Args:
      count: number of axes, >= 1.
      columns: columns of the grid; fewer if there are fewer axes.
      width: of one panel, inches.
      height: of one panel, inches.
      options: for ``plt.subplots``.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    size = width * columns, height * rows + 0.6
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat[:count]:
        axes.grid(alpha=0.25, lw=0.5)
    return figure, list(grid.flat[:count])


def add_legend(figure: plt.Figure, axes: plt.Axes, columns: int = 4) -> None:
    """Adds one legend for all panels below the figure, from the lines of ``axes``.

    It has at most ``columns`` columns, and no more than fit into the figure.
    """
    handles, labels = axes.get_legend_handles_labels()
    widest = 0.65 + 0.07 * max(map(len, labels), default=0)  # inches: the line, and letters of 9 points
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(columns, len(labels), int(figure.get_figwidth() // widest))),
        frameon=False,
        fontsize=9,
    )


def draw_boxes(axes: plt.Axes, boxes: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    """Draws a labelled box plot for each list of values; values that are not finite are omitted."""
    finite = [[value for value in values if np.isfinite(value)] for values in boxes.values()]
    drawn = axes.boxplot(finite, patch_artist=True, medianprops={"color": BLACK})
    for patch, name in zip(drawn["boxes"], boxes, strict=True):
        patch.set_facecolor(colors.get(name, SKY))
    axes.set_xticks(np.arange(1, len(boxes) + 1), list(boxes), rotation=40, ha="right", fontsize=8)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as PNG and closes it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)


def percent_of_steps(count: int) -> np.ndarray:
    """Progress of training in percent at ``count`` evenly spaced values, the last at the end.

    Examples:
      >>> percent_of_steps(4)
      array([ 25.,  50.,  75., 100.])
    """
    return np.linspace(0, 100, count + 1)[1:]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running mean over ``width`` values, shape (n - width + 1,).

    Examples:
      >>> smooth(np.array([1.0, 3.0, 5.0]), 2)
      array([2., 4.])
    """
    return np.convolve(values, np.full(width, 1 / width), mode="valid")
