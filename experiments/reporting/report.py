"""The table, the figures and the report of the command ``compare``."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from rich import box
from rich.table import Table

from experiments.reporting import drawing, html
from experiments.reporting.summary import GREEDYLR, STAGES, TIE_BAND, interval_text
from experiments.training.schedules import SCHEDULES

_OUTCOME_COLORS = {"beats": "#d9f0d9", "loses": "#f7d9d4"}
HEADERS = (
    "optimizer",
    "initial rate",
    "schedule",
    *(f"loss at {stage}%" for stage in STAGES),
    "test %",
    *(f"GreedyLR\nat {stage}%" for stage in STAGES),
    "final loss minus\nGreedyLR's [95% CI]",
)
_WIDE = 120  # minimum columns of a terminal for the whole table


def table_cells(table: pl.DataFrame) -> list[tuple[str, ...]]:
    """The cells of the table, one tuple per row, in the order of :data:`HEADERS`."""
    cells = []
    for row in table.iter_rows(named=True):
        cells.append(
            (
                row["optimizer"],
                f"{row['learning_rate']:g}",
                row["schedule"],
                *(f"{row[f'loss_{stage}']:.3g}" for stage in STAGES),
                f"{row['test_metric']:.1f}",
                *(row[f"at_{stage}"] or "" for stage in STAGES),
                _interval(row),
            )
        )
    return cells


def _interval(row: dict[str, float | None]) -> str:
    if row["difference"] is None:
        return ""
    if math.isnan(row["difference_low"]):
        return f"{row['difference']:+.2g} [none]"
    return interval_text(row, "+.2g")


def rich_table(table: pl.DataFrame, title: str, width: int) -> Table:
    """The table for a terminal of ``width`` columns, without confidence intervals if it is narrow."""
    shown = HEADERS[2:] if width >= _WIDE else HEADERS[2:-1]
    caption = None if width >= _WIDE else "Confidence intervals: table.csv, table.png, or a wider terminal."
    printed = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in shown:
        broken = header.replace("loss at", "loss\nat")
        printed.add_column(broken if width >= _WIDE else broken.replace(GREEDYLR, "Greedy"), no_wrap=True)
    previous = None
    for optimizer, rate, *cells in table_cells(table):
        if (optimizer, rate) != previous:
            previous = optimizer, rate
            printed.add_section()
            printed.add_row(f"[bold]{optimizer} from {rate}[/bold]")
        printed.add_row(f"  {cells[0]}", *cells[1 : len(shown)])
    return printed


def make_title(task: str, steps: int, seeds: int) -> str:
    """The title of the table and the figures."""
    return f"{task}: median of {seeds} seeds, {steps} steps; a tie is a difference below {TIE_BAND:g}"


def count_outcomes(table: pl.DataFrame) -> str:
    """A sentence on how often GreedyLR beats, ties and loses, over all cells and stages."""
    outcomes = [row for stage in STAGES for row in table[f"at_{stage}"].drop_nulls()]
    counts = {name: outcomes.count(name) for name in ("beats", "ties", "loses")}
    return (
        f"Of {len(outcomes)} comparisons (schedule x optimizer x initial rate x stage) {GREEDYLR} beats "
        f"{counts['beats']}, ties {counts['ties']} and loses {counts['loses']}."
    )


def draw_table(table: pl.DataFrame, title: str) -> plt.Figure:
    """The table as a figure."""
    cells = table_cells(table)
    row_height, head = 0.22, 0.45  # inches
    height = row_height * len(cells) + head
    figure = plt.figure(figsize=(14, height + 0.5))
    figure.suptitle(title, x=0.01, ha="left", y=1 - 0.12 / (height + 0.5), fontsize=12)
    axes = figure.add_axes((0.01, 0.05 / (height + 0.5), 0.98, height / (height + 0.5)))
    axes.axis("off")
    widths = [0.07, 0.08, 0.1, 0.09, 0.09, 0.09, 0.09, 0.08, 0.08, 0.08, 0.2]
    drawn = axes.table(cellText=cells, colLabels=HEADERS, colWidths=widths, cellLoc="left", bbox=(0, 0, 1, 1))
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        cell.set_height((head if row == 0 else row_height) / height)
        text = cell.get_text()
        if row == 0:
            text.set_weight("bold")
        elif cells[row - 1][2] == GREEDYLR:
            text.set_weight("bold")
            cell.set_facecolor("#fdf3e7")
        elif cells[row - 1][column] in _OUTCOME_COLORS:
            cell.set_facecolor(_OUTCOME_COLORS[cells[row - 1][column]])
    return figure


def _by_optimizer_and_rate(runs: pl.DataFrame) -> dict[str, dict[float, pl.DataFrame]]:
    """The runs of each optimizer and initial learning rate."""
    cells: dict[str, dict[float, pl.DataFrame]] = {}
    for (optimizer, rate), cell in runs.group_by(["optimizer", "learning_rate"], maintain_order=True):
        cells.setdefault(optimizer, {})[rate] = cell
    return {optimizer: dict(sorted(cells[optimizer].items())) for optimizer in cells}


def draw_histories(runs: pl.DataFrame, title: str) -> plt.Figure:
    """Loss above learning rate: a pair of rows for each optimizer, a column for each initial rate."""
    cells = _by_optimizer_and_rate(runs)
    columns = max(map(len, cells.values()))
    figure, grid = plt.subplots(
        2 * len(cells),
        columns,
        figsize=(4.2 * columns + 1.2, 4.6 * len(cells)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for row, (optimizer, by_rate) in enumerate(cells.items()):
        for column, (rate, cell) in enumerate(by_rate.items()):
            pair = grid[2 * row : 2 * row + 2, column]
            _draw_cell(pair, cell)
            pair[0].set_title(f"{optimizer}, initial rate {rate:g}", fontsize=10)
    for row in range(2 * len(cells)):
        grid[row, 0].set_ylabel("training loss" if row % 2 == 0 else "learning rate")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    drawing.add_legend(figure, grid[0, 0], columns=8)
    words = f"{title}; line: median, band: minimum to maximum"
    characters = int(11 * figure.get_figwidth())  # in a line of the figure's width
    figure.suptitle(textwrap.fill(words, characters), fontsize=12)
    return figure


def _histories(rows: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
    """Running means of the losses, shape (runs, steps - width + 1); learning rates, shape (runs, steps); and
    the width of the running mean.
    """
    width = max(1, int(rows["steps"][0]) // 40)
    losses = np.array([drawing.smooth(np.array(loss), width) for loss in rows["loss"].to_list()])
    return losses, np.array(rows["rate"].to_list()), width


def _draw_cell(pair: Sequence[plt.Axes], cell: pl.DataFrame) -> None:
    for (schedule,), rows in cell.group_by(["schedule"], maintain_order=True):
        look, is_greedy = SCHEDULES[schedule].look, schedule == GREEDYLR
        style = {**look.matplotlib(), "linewidth": 2.0 if is_greedy else 1.2, "zorder": 3 if is_greedy else 2}
        losses, rates, width = _histories(rows)
        x = np.arange(losses.shape[1]) + width
        pair[0].plot(x, np.median(losses, axis=0), label=schedule, **style)
        pair[0].fill_between(x, losses.min(axis=0), losses.max(axis=0), color=look.color, alpha=0.15, lw=0)
        pair[1].plot(np.arange(1, rates.shape[1] + 1), np.median(rates, axis=0), **style)
    initial = float(cell["learning_rate"][0])
    # Passive schedules decay to 0, which a logarithmic axis cannot show.
    pair[1].set_ylim(initial / 30, initial * 15)
    for axes in pair:
        axes.set_visible(True)
        axes.set_yscale("log")
        axes.grid(alpha=0.25, linewidth=0.5)


def sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    """The report: the table, and loss and learning rate for each optimizer and initial rate."""
    headers = [header.replace("\n", " ") for header in HEADERS]
    parts = [html.Section("Table", "", [html.Table(headers, table_cells(table))])]
    for optimizer, by_rate in _by_optimizer_and_rate(runs).items():
        for rate, cell in by_rate.items():
            losses, rates = [], []
            for (schedule,), rows in cell.group_by(["schedule"], maintain_order=True):
                entry = SCHEDULES[schedule]
                run_losses, run_rates, width = _histories(rows)
                loss, rate_history = np.median(run_losses, axis=0), np.median(run_rates, axis=0)
                style = entry.look.plotly()
                losses.append(html.Curve(entry.label, np.arange(len(loss)) + width, loss, style))
                rates.append(
                    html.Curve(entry.label, np.arange(1, len(rate_history) + 1), rate_history, style)
                )
            figures = [
                html.line_figure(losses, "step", "training loss, running mean", y_log=True),
                html.line_figure(rates, "step", "learning rate", y_log=True),
            ]
            parts.append(html.Section(f"{optimizer} from {rate:g}", "Medians over seeds.", figures))
    return parts
