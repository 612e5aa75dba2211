"""The table and the figures of a comparison."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from rich import box
from rich.table import Table

from experiments.reporting import drawing
from experiments.reporting.summary import OURS, STAGES, interval_text
from experiments.training.schedules import COMPARED
from experiments.training.store import write_atomically

_PALETTE = (drawing.SKY, drawing.GREEN, drawing.BLUE, drawing.ORANGE, drawing.RED)
COLORS = dict(zip(COMPARED, _PALETTE, strict=True))
_OUTCOME_COLORS = {"beats": "#d9f0d9", "loses": "#f7d9d4"}
LINES = dict.fromkeys(COMPARED, "-") | {"plateau": "--"}  # often on top of the constant rate
HEADERS = (
    "optimizer",
    "initial rate",
    "schedule",
    *(f"loss at {stage}%" for stage in STAGES),
    "test %",
    *(f"GreedyLR\nat {stage}%" for stage in STAGES),
    "final loss minus\nGreedyLR's [95% CI]",
)
_WIDE = 120  # columns of a terminal that shows the whole table


def table_cells(table: pl.DataFrame) -> list[tuple[str, ...]]:
    """The cells of the printed table, one tuple a row, in the order of :data:`HEADERS`."""
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
    """The table for a terminal of ``width`` columns; a narrow one is spared the confidence intervals."""
    shown = HEADERS[2:] if width >= _WIDE else HEADERS[2:-1]
    caption = None if width >= _WIDE else "Confidence intervals: table.csv, table.png, or a wider terminal."
    printed = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in shown:
        broken = header.replace("loss at", "loss\nat")
        printed.add_column(broken if width >= _WIDE else broken.replace(OURS, "Greedy"), no_wrap=True)
    previous = None
    for optimizer, rate, *cells in table_cells(table):
        if (optimizer, rate) != previous:
            previous = optimizer, rate
            printed.add_section()
            printed.add_row(f"[bold]{optimizer} from {rate}[/bold]")
        printed.add_row(f"  {cells[0]}", *cells[1 : len(shown)])
    return printed


def make_title(task: str, steps: int, seeds: int) -> str:
    """What the table and the figures say above."""
    return f"{task}: median of {seeds} seeds, {steps} steps; a tie is a difference under 0.1"


def verdict(table: pl.DataFrame) -> str:
    """One sentence: how often GreedyLR beats, ties and loses over all cells and stages."""
    outcomes = [row for stage in STAGES for row in table[f"at_{stage}"].drop_nulls()]
    counts = {name: outcomes.count(name) for name in ("beats", "ties", "loses")}
    return (
        f"Of {len(outcomes)} comparisons (schedule x optimizer x initial rate x stage) {OURS} beats "
        f"{counts['beats']}, ties {counts['ties']} and loses {counts['loses']}."
    )


def write(runs: pl.DataFrame, table: pl.DataFrame, folder: Path) -> None:
    """Writes ``table.csv``, ``table.png`` and ``histories.png`` into ``folder``."""
    write_atomically(folder / "table.csv", table.write_csv)
    task, steps = runs["task"][0], runs["steps"][0]
    title = make_title(task, steps, runs["seed"].n_unique())
    for name, figure in (
        ("table.png", draw_table(table, title)),
        ("histories.png", draw_histories(runs, title)),
    ):
        drawing.save(figure, folder / name)


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
        elif cells[row - 1][2] == OURS:
            text.set_weight("bold")
            cell.set_facecolor("#fdf3e7")
        elif cells[row - 1][column] in _OUTCOME_COLORS:
            cell.set_facecolor(_OUTCOME_COLORS[cells[row - 1][column]])
    return figure


def draw_histories(runs: pl.DataFrame, title: str) -> plt.Figure:
    """Loss above learning rate, a pair of rows for each optimizer and a column for each initial rate."""
    optimizers = runs["optimizer"].unique(maintain_order=True).to_list()
    rates = {
        name: runs.filter(pl.col("optimizer") == name)["learning_rate"].unique(maintain_order=True).to_list()
        for name in optimizers
    }
    columns = max(map(len, rates.values()))
    figure, grid = plt.subplots(
        2 * len(optimizers),
        columns,
        figsize=(4.2 * columns + 1.2, 4.6 * len(optimizers)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for row, optimizer in enumerate(optimizers):
        for column in range(columns):
            pair = grid[2 * row : 2 * row + 2, column]
            if column >= len(rates[optimizer]):
                for axes in pair:
                    axes.set_visible(False)
                continue
            rate = rates[optimizer][column]
            cell = runs.filter((pl.col("optimizer") == optimizer) & (pl.col("learning_rate") == rate))
            _draw_cell(pair, cell)
            pair[0].set_title(f"{optimizer}, initial rate {rate:g}", fontsize=10)
    for row in range(2 * len(optimizers)):
        grid[row, 0].set_ylabel("training loss" if row % 2 == 0 else "learning rate")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    drawing.add_legend(figure, grid[0, 0], columns=len(COMPARED))
    figure.suptitle(f"{title}; line: median, band: least to greatest", fontsize=12)
    return figure


def _draw_cell(pair: np.ndarray, cell: pl.DataFrame) -> None:
    steps = int(cell["steps"][0])
    width = max(1, steps // 40)
    for schedule in COMPARED:
        rows = cell.filter(pl.col("schedule") == schedule)
        if rows.is_empty():
            continue
        style = {"color": COLORS[schedule], "linestyle": LINES[schedule]}
        style["linewidth"] = 2.0 if schedule == OURS else 1.2
        order = {"zorder": 3 if schedule == OURS else 2}
        losses = np.array([drawing.smooth(np.array(loss), width) for loss in rows["loss"].to_list()])
        x = np.arange(losses.shape[1]) + width
        pair[0].plot(x, np.median(losses, axis=0), label=schedule, **style, **order)
        pair[0].fill_between(
            x, losses.min(axis=0), losses.max(axis=0), color=COLORS[schedule], alpha=0.15, lw=0
        )
        learning_rates = np.array(rows["rate"].to_list())
        pair[1].plot(np.arange(1, steps + 1), np.median(learning_rates, axis=0), **style, **order)
    initial = float(cell["learning_rate"][0])
    pair[0].set_yscale("log")
    pair[1].set_yscale("log")
    pair[1].set_ylim(initial / 30, initial * 15)  # passive schedules go to zero, off any log axis
    for axes in pair:
        axes.grid(alpha=0.25, linewidth=0.5)
