"""Figures without colour vision and without colours: simulated colours, contrast, line styles and markers."""

import itertools

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest

from experiments.reporting import drawing, html, palette, report
from experiments.reporting.palette import Look
from experiments.training.schedules import SCHEDULES

COLORS = {name: getattr(palette, name) for name in dir(palette) if name.isupper() and name[0] != "_"}

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# 2009: matrices for linear RGB at severity 1.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(color):
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB, white point D65."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / (0.95047, 1.0, 1.08883)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def test_the_simulation_confuses_red_and_green():
    """Colours that a deuteranope cannot distinguish are close in the simulation, and far apart without."""
    distance = {
        name: np.linalg.norm(lab(matrix @ linear("#B2182B")) - lab(matrix @ linear("#5A6B22")))
        for name, matrix in DEFICIENCIES.items()
    }
    assert distance["none"] > 60
    assert distance["deuteranopia"] < 25


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_the_colours_differ_under_every_deficiency(name):
    assert len(COLORS) == 10
    seen = {color: lab(DEFICIENCIES[name] @ linear(code)) for color, code in COLORS.items()}
    for left, right in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[left] - seen[right]) > 15, (left, right)


@pytest.mark.parametrize("color", COLORS)
def test_every_colour_is_visible_on_white_paper(color):
    assert 1.05 / (TO_XYZ[1] @ linear(COLORS[color]) + 0.05) > 2.2


def test_every_schedule_is_distinguished_without_colour():
    looks = {name: (entry.look.line, *entry.look.markers) for name, entry in SCHEDULES.items()}
    assert all(marker is not None for _, marker, _ in looks.values())
    assert len(set(looks.values())) == len(looks)


def test_lines_are_drawn_with_their_styles_and_markers():
    """In grey pixels too: a marker is drawn where the line alone would be thin."""
    pictures = {}
    for color in (palette.RED, palette.BLUE):
        figure, axes = plt.subplots(figsize=(3, 2), dpi=120)
        axes.plot([0, 1], [0, 1], **(Look(color, ":").matplotlib() | {"color": "black"}))
        axes.set_axis_off()
        figure.canvas.draw()
        pictures[color] = np.asarray(figure.canvas.buffer_rgba())[..., 0] < 128
        plt.close(figure)
    stars, circles = pictures.values()
    assert stars.sum() > 50 and circles.sum() > 50
    assert (stars ^ circles).sum() > 30  # the same line in black; only the markers differ


def test_interactive_figures_have_the_same_styles():
    curves = [html.Curve(name, [0, 1], [1, 2], Look(palette.GREEN, "-.").plotly()) for name in "ab"]
    trace = html.line_figure([*curves, html.Curve("plain", [0], [1])], "x", "y").data
    assert trace[0].line.dash == "dashdot" and trace[0].marker.symbol == "triangle-up"
    assert trace[0].mode == "lines+markers" and trace[2].mode == "lines"
    assert trace[0].marker.maxdisplayed == 12  # of 600 points


def test_names_of_the_palette_are_those_of_drawing():
    assert all(getattr(drawing, name) == code for name, code in COLORS.items())


@pytest.mark.parametrize("rates", [1, 3])
def test_the_title_of_the_histories_fits_into_the_figure(rates):
    run = {"optimizer": "sgd", "seed": 0, "steps": 40, "loss": [1.0] * 40, "rate": [0.1] * 40}
    cells = itertools.product((0.1, 0.2, 0.4)[:rates], ("cosine", "GreedyLR"))
    runs = pl.DataFrame([run | {"learning_rate": rate, "schedule": name} for rate, name in cells])
    figure = report.draw_histories(runs, report.make_title("question-answering", 6000, 5))
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
    plt.close(figure)


@pytest.mark.parametrize("width", [4.0, 9.0, 14.0])
def test_a_legend_is_no_wider_than_its_figure(width):
    figure, axes = plt.subplots(figsize=(width, 3.0), layout="constrained")
    for label in ("baseline", "LRTuner, the paper's settings", "LRTuner, our defaults", "constant"):
        axes.plot([0, 1], label=label)
    drawing.add_legend(figure, axes)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    plt.close(figure)
