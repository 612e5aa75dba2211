"""What the figures of all studies share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, whatever the machine's display

import matplotlib.pyplot as plt
import numpy as np

from experiments.training.store import write_atomically

# Okabe and Ito's palette: told apart by readers who do not see all colours.
BLUE, SKY, GREEN, ORANGE, RED, PINK, YELLOW, GREY, BLACK, BROWN = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
    "#999999",
    "#000000",
    "#8C510A",
)


def panels(
    count: int, columns: int, *, width: float = 4.4, height: float = 3.4, **options: object
) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with a grid of axes; places beyond ``count`` stay empty."""
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
    """One legend for all panels, below them, from the lines of one."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        frameon=False,
        fontsize=9,
    )


def draw_boxes(axes: plt.Axes, boxes: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    """A box for each list of values, labelled below; values that are not finite are left out."""
    finite = [[value for value in values if np.isfinite(value)] for values in boxes.values()]
    drawn = axes.boxplot(finite, patch_artist=True, medianprops={"color": BLACK})
    for patch, name in zip(drawn["boxes"], boxes, strict=True):
        patch.set_facecolor(colors.get(name, SKY))
    axes.set_xticks(np.arange(1, len(boxes) + 1), list(boxes), rotation=40, ha="right", fontsize=8)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as PNG, and lets it go."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)


def percent_of_steps(count: int) -> np.ndarray:
    """How far a training is, in percent, at each of ``count`` values that are evenly spread over it.

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
