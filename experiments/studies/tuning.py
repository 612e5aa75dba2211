"""Tuning of initial learning rates on seeds that are not reported."""

import polars as pl

TUNING_SEEDS = (1000, 1001)


def best_rates(runs: pl.DataFrame) -> dict[tuple[str, str], float]:
    """For each (task, optimizer) the rate with the highest mean held-out metric on the tuning seeds.

    Among equal ones the lowest rate.
    """
    tuned = runs.filter(pl.col("seed").is_in(TUNING_SEEDS))
    means = tuned.group_by(["task", "optimizer", "learning_rate"]).agg(pl.col("test_metric").mean())
    best = means.sort(["test_metric", "learning_rate"], descending=[True, False]).group_by(
        ["task", "optimizer"], maintain_order=True
    )
    return {key: cell["learning_rate"][0] for key, cell in best}


def reported(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of all other seeds."""
    return runs.filter(~pl.col("seed").is_in(TUNING_SEEDS))
