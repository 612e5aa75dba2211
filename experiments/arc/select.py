"""Selects the best of several candidate networks by training a proxy task at three initial rates.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.5 and
Appendix A.2: the metrics on held-out samples do not predict how well a candidate controls a training run.
Therefore each of ten candidates trains a network that the samples do not contain, on data that they do
contain, five times at each of three initial rates. The candidate with the highest mean of the best accuracies
is selected.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import polars as pl

from experiments.arc import DECISIONS, EPOCHS
from experiments.arc.metrics import by_metric
from experiments.arc.training import METRICS_FILE
from experiments.errors import UsageError
from experiments.reporting import drawing
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep
from experiments.training.engine import Settings, make_specs
from experiments.training.schedules import arc_with
from experiments.training.store import write_atomically
from experiments.training.sweep import Group

TASK, OPTIMIZER, LEARNING_RATES = "mnist1d-residual", "adamw", (1e-1, 1e-3, 1e-5)
BASELINES = ("constant", "cosine")
SELECTED = "arc.safetensors"


class SelectionSettings(NamedTuple):
    """The number of training steps and seeds of the proxy task."""

    steps: int
    seeds: int


def select(candidates: Path, job: Job, settings: SelectionSettings) -> Path:
    """Trains the proxy task with all candidates, and copies the best one. Resumes after an interruption.

    Writes ``runs.parquet``, ``selection.csv``, ``by_metric.csv``, ``selection.png`` and ``arc.safetensors``.

    Args:
      candidates: the folder that ``arc train`` wrote.
      job: the command line's call.
      settings: training steps and number of seeds.

    Returns:
      The file with the selected weights.

    Raises:
      UsageError: if there are no candidates in the folder.
    """
    paths = sorted(candidates.glob("candidate-*.safetensors"))
    if not paths:
        raise UsageError(f"no candidates in {candidates}; train them with arc train")
    schedules = {path.stem: arc_with(str(path), decisions=DECISIONS) for path in paths}
    described = {"candidates": {path.stem: path.stat().st_mtime for path in paths}, "seeds": settings.seeds}
    sweep = Sweep(job, Settings(settings.steps, EPOCHS, validated=True), described)
    specs = []
    for label, schedule in ({name: name for name in BASELINES} | schedules).items():
        specs += make_specs((schedule,), LEARNING_RATES, range(settings.seeds), label=label)
    sweep.train([Group(TASK, OPTIMIZER, specs)])
    runs = sweep.finish().with_columns(schedule=pl.col("label"))
    table = summarize(runs)
    compare_metrics(candidates, table, job)
    best = table.filter(pl.col("schedule").is_in(list(schedules)))["schedule"][0]
    write_atomically(job.out / "selection.csv", table.write_csv)
    drawing.save(draw(runs, best), job.out / "selection.png")
    selected = job.out / SELECTED
    write_atomically(selected, lambda path: shutil.copyfile(candidates / f"{best}.safetensors", path))
    headers = ("controller", *table.columns[1:])
    cells = [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in table.iter_rows()]
    print_table(job.console, f"Best accuracy on {TASK}, %, mean of {settings.seeds} seeds", headers, cells)
    job.console.print(f"{best} has the highest mean; its weights are in {selected}.")
    return selected


def compare_metrics(candidates: Path, table: pl.DataFrame, job: Job) -> None:
    """Writes and prints ``by_metric.csv``: which candidate each held-out metric would select (Figure 7)."""
    path = candidates / METRICS_FILE
    if not path.exists():  # candidates of an earlier version
        return
    scores = {
        int(name.removeprefix("candidate-")): mean
        for name, mean in table.select("schedule", "mean").iter_rows()
        if name.startswith("candidate-")
    }
    compared = by_metric(pl.read_csv(path), scores)
    write_atomically(job.out / "by_metric.csv", compared.write_csv)
    cells = [
        [row["metric"], str(row["candidate"]), f"{row['score']:.2f}",
         "" if row["correlation"] is None else f"{row['correlation']:+.2f}"]
        for row in compared.iter_rows(named=True)
    ]  # fmt: skip
    headers = ("selected by", "candidate", "accuracy, %", "rank correlation")
    print_table(job.console, f"Held-out metrics and the best accuracy on {TASK}", headers, cells)


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row per controller, the best first.

    Returns:
      A frame with ``schedule``; for each initial rate, a column with the mean over the seeds of each run's
      best accuracy in percent; ``mean``: the mean over all runs.
    """
    scored = runs.with_columns(accuracy=100 * pl.col("test_metrics").list.max())
    from_rates = {
        f"from {rate:g}": pl.col("accuracy").filter(pl.col("learning_rate") == rate).mean()
        for rate in LEARNING_RATES
    }
    means = scored.group_by("schedule").agg(**from_rates, mean=pl.col("accuracy").mean())
    return means.sort("mean", "schedule", descending=[True, False])


def draw(runs: pl.DataFrame, best: str) -> plt.Figure:
    """Draws the best accuracies of each controller as a box (Figure 8 of the paper)."""
    scored = runs.sort("schedule").with_columns(pl.col("schedule").str.strip_prefix("candidate-"))
    scored = scored.with_columns(accuracy=100 * pl.col("test_metrics").list.max())
    colors = {best.removeprefix("candidate-"): drawing.ORANGE}
    figure, panels = drawing.panels(len(LEARNING_RATES), 3, width=5.0)
    for axes, rate in zip(panels, LEARNING_RATES, strict=True):
        own = scored.filter(pl.col("learning_rate") == rate)
        cells = own.group_by("schedule", maintain_order=True).agg("accuracy")
        drawing.draw_boxes(axes, dict(cells.iter_rows()), colors)
        axes.set_title(f"initial rate {rate:g}", fontsize=10)
    panels[0].set_ylabel("best accuracy, %")
    figure.suptitle(f"Candidates on {TASK}; the selected candidate is orange")
    return figure
