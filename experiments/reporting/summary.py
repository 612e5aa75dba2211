"""The table of a comparison, from the rows of ``runs.parquet``, and statistics that studies share."""

import math
from collections.abc import Mapping

import numpy as np
import polars as pl
from scipy import stats

STAGES = (10, 50, 100)  # percent of the steps, as in Tables V to X of the GreedyLR paper
TIE_BAND = 0.1  # "no significant difference" in those tables
GREEDYLR = "GreedyLR"  # the schedule that all others are compared with


def stage_losses(loss: np.ndarray) -> dict[int, float]:
    """The training loss at each stage: the mean of the batch losses over the 5% of steps before it.

    The loss of a single batch is mostly noise. The loss is infinite if any of the batch losses is not finite.

    Examples:
      >>> stage_losses(np.arange(100.0, 0.0, -1.0))
      {10: 93.0, 50: 53.0, 100: 3.0}
    """
    width = max(1, len(loss) // 20)
    result = {}
    for stage in STAGES:
        end = max(width, round(len(loss) * stage / 100))
        mean = float(np.mean(loss[end - width : end]))
        result[stage] = mean if math.isfinite(mean) else math.inf
    return result


def outcome(baseline: float, greedy: float) -> str:
    """Compares GreedyLR's loss with a baseline's: ``"beats"``, ``"ties"`` (within 0.1) or ``"loses"``.

    Examples:
      >>> outcome(1.0, 0.5), outcome(1.0, 0.95), outcome(0.5, 1.0), outcome(math.inf, math.inf)
      ('beats', 'ties', 'loses', 'ties')
    """
    if baseline == greedy or abs(baseline - greedy) < TIE_BAND:
        return "ties"
    return "beats" if greedy < baseline else "loses"


def confidence_interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95% confidence interval of a mean difference over seeds (Student's t).

    Returns:
      The lower and the upper bound; NaN if there are fewer than two differences or one is not finite.

    Examples:
      >>> low, high = confidence_interval(np.array([1.0, 2.0, 3.0]))
      >>> round(low, 3), round(high, 3)
      (-0.484, 4.484)
    """
    finite = differences[np.isfinite(differences)]
    if len(finite) < 2 or len(finite) < len(differences):
        return math.nan, math.nan
    if np.ptp(finite) == 0:
        return float(finite[0]), float(finite[0])
    interval = stats.ttest_1samp(finite, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def interval_text(row: Mapping[str, float], spec: str, name: str = "difference") -> str:
    """A column of a table's row with its confidence interval (``NAME_low``, ``NAME_high``), as text.

    Examples:
      >>> interval_text({"difference": 0.5, "difference_low": -1.0, "difference_high": 2.0}, "+.1f")
      '+0.5 [-1.0, +2.0]'
    """
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:{spec}} [{low:{spec}}, {high:{spec}}]"


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each optimizer, initial rate and schedule.

    Args:
      runs: one row per run, the rows of ``runs.parquet``.

    Returns:
      A frame with the columns ``optimizer``, ``learning_rate``, ``schedule``; ``loss_10``, ``loss_50``,
      ``loss_100``: medians over the seeds of :func:`stage_losses`; ``test_metric``: the median, in percent;
      ``at_10``, ``at_50``, ``at_100``: the :func:`outcome` of GreedyLR against this schedule;
      ``difference``, ``difference_low``, ``difference_high``: mean final loss of this schedule minus
      GreedyLR's, paired by seed, with its 95% confidence interval (positive: GreedyLR's is lower).
    """
    keys = ["optimizer", "learning_rate", "schedule", "seed"]
    stages = pl.DataFrame(
        [
            dict(zip(keys, run[: len(keys)], strict=True))
            | {"test_metric": 100 * run[len(keys)]}
            | {f"loss_{stage}": loss for stage, loss in stage_losses(np.array(run[-1], float)).items()}
            for run in runs.select(*keys, "test_metric", "loss").iter_rows()
        ]
    )
    rows = []
    cells = stages.group_by(["optimizer", "learning_rate"], maintain_order=True)
    for (optimizer, learning_rate), cell in cells:
        greedy = cell.filter(pl.col("schedule") == GREEDYLR).sort("seed")
        for (schedule,), runs_of_schedule in cell.group_by(["schedule"], maintain_order=True):
            row = {"optimizer": optimizer, "learning_rate": learning_rate, "schedule": schedule}
            rows.append(row | _cell(runs_of_schedule.sort("seed"), greedy, schedule == GREEDYLR))
    return pl.DataFrame(rows, infer_schema_length=None)


def _cell(own: pl.DataFrame, greedy: pl.DataFrame, is_greedy: bool) -> dict[str, float | str | None]:
    losses = {stage: float(np.median(own[f"loss_{stage}"])) for stage in STAGES}
    cell: dict[str, float | str | None] = {f"loss_{stage}": losses[stage] for stage in STAGES}
    cell["test_metric"] = float(np.median(own["test_metric"]))
    for stage in STAGES:
        reached = float(np.median(greedy[f"loss_{stage}"]))
        cell[f"at_{stage}"] = None if is_greedy else outcome(losses[stage], reached)
    differences = own["loss_100"].to_numpy() - greedy["loss_100"].to_numpy()
    low, high = confidence_interval(differences)
    names = ("difference", "difference_low", "difference_high")
    values = (None, None, None) if is_greedy else (float(np.mean(differences)), low, high)
    return cell | dict(zip(names, values, strict=True))
