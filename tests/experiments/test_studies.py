"""Studies: what their numbers mean, that they follow from the rows, and that their reports open."""

import math

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments.studies import (
    STUDIES,
    greedylr,
    hypergradient,
    initial_rate,
    leaderboard,
    lrtuner,
    polling,
    robustness,
    theory,
)
from experiments.studies.base import Job
from tests.experiments.browser import HAS_BROWSER, open_and_click


def history(*levels, steps=100):
    """A loss that is at these levels for equal parts of the training."""
    return np.repeat(levels, steps // len(levels)).tolist()


def greedy_runs(baseline, ours, seeds=2):
    rows = []
    for seed in range(seeds):
        for schedule, loss in (("linear", baseline), ("GreedyLR", ours)):
            rows.append(
                dict(
                    task="tagging", optimizer="adamw", schedule=schedule, learning_rate=0.1, seed=seed,
                    steps=100,
                    loss=(np.array(loss) + 0.01 * seed * (schedule == "linear")).tolist(),
                )
            )  # fmt: skip
    return pl.DataFrame(rows)


def test_an_experiment_is_compared_as_the_paper_does():
    table = greedylr.summarize(greedy_runs(history(2.0, 1.0), history(1.95, 1.5)))
    row = table.row(0, named=True)
    assert (row["kind"], row["schedule"]) == ("tagging", "linear")
    assert (row["at_10"], row["at_50"], row["at_100"]) == ("yes*", "yes*", "no")
    # Baseline minus GreedyLR at the end: 1.0 - 1.5 and 1.01 - 1.5.
    assert row["difference"] == pytest.approx(-0.495)
    assert row["difference_low"] < -0.495 < row["difference_high"]


def test_a_baseline_that_diverges_did_not_finish_and_a_greedy_run_that_does_loses():
    diverged = history(1.0, math.nan)
    row = greedylr.summarize(greedy_runs(diverged, history(1.0, 1.0))).row(0, named=True)
    assert row["at_100"] == "dnf" and row["difference"] is None
    row = greedylr.summarize(greedy_runs(history(1.0, 1.0), diverged)).row(0, named=True)
    assert row["at_100"] == "no" and row["difference"] is None


def test_tables_ii_to_iv_follow_from_the_papers_own_tables():
    got = greedylr.tally(greedylr.published())
    # Table III's final figures are not those of Tables V to X (nor of Table IV, which agrees with them).
    wrong = {"final as good or better, %", "final worse, %", "average benefit", "as good or better at 50%, %"}
    assert {name for name in got if got[name] != greedylr.PRINTED[name]} == wrong
    assert got["final as good or better, %"] == got["as good or better at 100%, %"] == "85.94"
    assert got["as good or better at 50%, %"] == "81.82"  # printed 81.81


def leader_runs():
    """Two tasks, one seed: the tuned cosine is at 0.5 after three quarters of the training."""
    evaluations = leaderboard.EVALUATIONS
    falling = np.linspace(1.0, 0.4, evaluations)
    falling[leaderboard._TARGET_AT] = 0.5
    rows = [
        dict(task=task, optimizer="adamw", schedule="cosine", learning_rate=rate, seed=seed, seconds=1.0,
             test_losses=(falling + extra).tolist())
        for task in ("a", "b") for seed in (1000, 1001) for rate, extra in ((0.1, 0.0), (0.2, 0.3))
    ]  # fmt: skip
    for index, each in enumerate(leaderboard.SUBMISSIONS):
        for task in ("a", "b"):
            losses = np.ones(evaluations)
            if not (task == "b" and index > 0):
                losses[min(evaluations - 1, 3 + index) :] = 0.5
            rows.append(
                dict(task=task, optimizer=each.optimizer, schedule=each.schedule,
                     learning_rate=each.learning_rate, seed=0, seconds=2.0, test_losses=losses.tolist())
            )  # fmt: skip
    return pl.DataFrame(rows)


def test_the_leaderboard_times_submissions_until_the_target():
    runs = leader_runs()
    assert leaderboard.targets(runs) == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}
    measured = leaderboard.measure(runs)
    first, second = leaderboard.SUBMISSIONS[:2]
    times = {(row["submission"], row["task"]): row for row in measured.iter_rows(named=True)}
    assert times[first.name, "a"]["steps"] == pytest.approx(4 / leaderboard.EVALUATIONS)
    assert times[first.name, "a"]["seconds"] == pytest.approx(8 / leaderboard.EVALUATIONS)
    assert times[second.name, "b"]["steps"] == math.inf
    table = leaderboard.summarize(measured)
    scores = dict(zip(table["submission"], table["score_steps"], strict=True))
    assert scores[first.name] == 1.0
    # Five steps against four on one task, never on the other.
    assert scores[second.name] == pytest.approx((4 - 5 / 4) / 3 / 2)
    assert table["reached"].to_list().count(50.0) == len(leaderboard.SUBMISSIONS) - 1


def test_a_target_that_nobody_reaches_counts_against_all():
    times = np.array([[1.0, math.inf], [1.0, math.inf]])
    np.testing.assert_array_equal(leaderboard.score(times), [0.5, 0.5])
    np.testing.assert_array_equal(leaderboard.profile(times, np.array([1.0, 4.0])), np.full((2, 2), 0.5))


def test_recovery_counts_the_steps_until_the_loss_is_back():
    name = "drift, 1, knock"  # greatest at the end of the middle half
    moment = 149
    loss = np.ones(200)
    loss[moment + 1 : moment + 11] = 5.0
    assert robustness.recovery(loss, name, 0) == 10.0
    assert robustness.recovery(np.ones(200), name, 0) == 0.0
    loss[moment + 1 :] = 5.0
    assert robustness.recovery(loss, name, 0) == math.inf
    loss[moment + 1 :] = math.nan
    assert robustness.recovery(loss, name, 0) == math.inf


def robust_row(schedule, disturbance, level):
    return dict(
        task="t", schedule=schedule, seed=0, disturbance=disturbance, loss=history(10.0, level, steps=200)
    )


def test_damage_is_relative_to_the_same_schedule_and_the_final_loss_to_the_constant_rate():
    noise = "gaussian, 1, gradient"
    rows = [robust_row("constant", "none", 2.0), robust_row("GreedyLR", "none", 1.0)]
    rows += [robust_row("constant", noise, 6.0), robust_row("GreedyLR", noise, math.nan)]
    measured = robustness.measure(pl.DataFrame(rows))
    got = {
        (row["schedule"], row["target"]): (row["final"], row["damage"])
        for row in measured.iter_rows(named=True)
    }
    assert got["GreedyLR", "undisturbed"] == (0.5, 1.0)
    assert got["constant", "gradient"] == (3.0, 3.0)
    assert got["GreedyLR", "gradient"] == (math.inf, math.inf)


def test_steps_are_saved_where_the_baselines_metric_is_reached():
    def rows(final, metrics):
        return pl.DataFrame({"test_metric": [final] * 2, "test_metrics": [metrics] * 2})

    baseline = rows(0.8, [0.1, 0.8])
    assert lrtuner.saved(rows(0.9, [0.2, 0.5, 0.8, 0.9]), baseline) == pytest.approx(25.0)
    assert lrtuner.saved(rows(0.9, [0.9, 0.5, 0.8, 0.9]), baseline) == pytest.approx(25.0)  # for good
    assert lrtuner.saved(rows(0.9, [0.9, 0.9, 0.8, 0.9]), baseline) == pytest.approx(75.0)
    assert lrtuner.saved(rows(0.7, [0.2, 0.9, 0.7, 0.7]), baseline) is None


def test_every_study_of_the_list_can_be_loaded():
    for name, study in STUDIES.items():
        assert callable(study.load()), name
        assert study.summary


def shrink(monkeypatch, study):
    """A few seconds of each study, on the smallest tasks."""
    presets = {
        "greedylr": {"tasks": 1, "rates": 1, "steps": 40, "seeds": 2},
        "robustness": {"tasks": ("quadratic-10", "digits-mlp"), "steps": 100, "seeds": 1},
        "initial-rate": {
            "tasks": ("digits-mlp",),
            "schedules": initial_rate.SCHEDULES,
            "steps": 30,
            "seeds": 2,
        },
        "lrtuner": {"steps": 40, "seeds": 2},
        "polling": {"steps": 40, "seeds": 2},
        "hypergradient": {"steps": 40, "seeds": 2},
        "theory": {"starts": 2},
        "leaderboard": {"tasks": ("quadratic-10", "ackley"), "steps": 40, "seeds": 2},
    }
    modules = {
        "greedylr": greedylr,
        "robustness": robustness,
        "initial-rate": initial_rate,
        "lrtuner": lrtuner,
        "polling": polling,
        "hypergradient": hypergradient,
        "theory": theory,
        "leaderboard": leaderboard,
    }
    monkeypatch.setitem(modules[study].PRESETS, "quick", presets[study])
    if study == "greedylr":
        small = {"tagging": ("X", ("digits-mlp",)), "summarization": ("IX", ("mnist1d-mlp",))}
        monkeypatch.setattr(greedylr, "KINDS", small)
        monkeypatch.setattr(
            greedylr, "SHOWN", (("tagging", "adagrad"), ("summarization", "sgd"), ("tagging", "adamw"))
        )
        monkeypatch.setattr(greedylr, "LEARNING_RATES", {name: (0.01, 0.01) for name in greedylr.PAIRS})
    if study == "initial-rate":
        monkeypatch.setattr(initial_rate, "OPTIMIZERS", ("sgd",))
    if study == "lrtuner":
        cases = tuple(
            case._replace(task="digits-mlp", table=str(i)) for i, case in enumerate(lrtuner.CASES[1:3])
        )
        monkeypatch.setattr(lrtuner, "CASES", cases[:1])
    if study == "polling":
        monkeypatch.setattr(polling, "TASKS", ("digits-mlp",))
    return modules[study]


RECOMPUTED = {
    "greedylr": lambda runs: {"table": greedylr.summarize(runs)},
    "robustness": lambda runs: {
        "table": robustness.summarize(robustness.measure(runs)),
        "against": robustness.compare(robustness.measure(runs)),
    },
    "initial-rate": lambda runs: {
        "table": initial_rate.summarize(runs),
        "gaps": pl.DataFrame(initial_rate.gaps(runs)),
    },
    "lrtuner": lambda runs: {"table": lrtuner.summarize(runs)},
    "polling": lambda runs: {"table": polling.summarize(runs)},
    "hypergradient": lambda runs: {"table": hypergradient.summarize(runs)},
    "theory": lambda runs: {"table": theory.summarize(runs)},
    "leaderboard": lambda runs: {
        "scores": leaderboard.summarize(leaderboard.measure(runs)),
        "tasks": leaderboard.by_task(leaderboard.measure(runs)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_from_end_to_end(study, tmp_path, monkeypatch):
    module = shrink(monkeypatch, study)
    console = Console(record=True, width=200)
    module.run(Job(study, "quick", tmp_path, console))
    assert "report.html" in console.export_text()
    runs = pl.read_parquet(tmp_path / "runs.parquet")
    for name, table in RECOMPUTED[study](runs).items():
        written = pl.read_csv(tmp_path / f"{name}.csv")
        assert written.columns == table.columns
        for column in table.columns:
            ours, theirs = table[column].to_list(), written[column].to_list()
            assert [str(a) if isinstance(a, str) else a for a in ours] == pytest.approx(
                [str(b) if isinstance(a, str) else b for a, b in zip(ours, theirs, strict=True)], nan_ok=True
            ), column
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(picture.stat().st_size > 10_000 for picture in pictures)
    page = (tmp_path / "report.html").read_text()
    assert f"python -m experiments study {study} --preset quick" in page and "runs.parquet by" in page
    if HAS_BROWSER:
        open_and_click(tmp_path / "report.html")


def rate_runs(accuracies, losses=None, seeds=(0, 1, 1000), spread=0.0):
    """Runs of three steps; accuracies and losses are by task, schedule and rate (0.1 and 1)."""
    rows = []
    for (task, schedule), values in accuracies.items():
        for number, (rate, accuracy) in enumerate(zip((0.1, 1.0), values, strict=True)):
            for seed in seeds:
                rows.append(
                    {
                        "task": task,
                        "optimizer": "sgd",
                        "schedule": schedule,
                        "learning_rate": rate,
                        "seed": seed,
                        "test_metric": accuracy + spread * (seed == 1) * (schedule == "auto"),
                        "test_loss": (losses or {}).get((task, schedule), (1.0, 1.0))[number],
                        "loss": [2.0, 1.0, 1.0 - accuracy],
                        "rate": [rate, rate, rate],
                    }
                )
    return pl.DataFrame(rows)


def test_the_verdict_on_initial_rates_compares_the_worst_with_the_best_of_cosine():
    runs = rate_runs(
        {
            ("digits-mlp", "cosine"): (0.5, 0.9),
            ("digits-mlp", "auto"): (0.9, 0.885),
            ("digits", "cosine"): (0.5, 0.9),
            ("digits", "auto"): (0.9, 0.87),
            ("tagging", "cosine"): (0.5, 0.9),
            ("tagging", "auto"): (0.8, 0.8),
        },
        {("digits", "cosine"): (1.0, 0.5), ("digits", "auto"): (0.4, 0.54)},
    )
    text = initial_rate.verdict(initial_rate.gaps(runs))
    assert "Of 1 pairs of the development tasks" in text and "on 1 (largest gap 1.5)" in text
    # Digits by its loss, 0.54 against 0.5, and by chance tagging, whose losses are all alike.
    assert "Of 2 pairs of the other tasks" in text and "on 0 (largest gap 10.0)" in text
    assert "least on 2, and one or the other holds on 2" in text
    # The medians are 0.75, 1.5 and 10 points below, with the same in each seed.
    assert "on 0 (largest mean gap 10.0 points)" in text


def test_a_median_that_seeds_disagree_on_is_not_below():
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.88, 0.88)}, spread=0.1)
    (gap,) = initial_rate.gaps(runs)
    assert gap.middle == pytest.approx(-3.0) and gap.middle_low < -3 < 0 < gap.middle_high
    (gap,) = initial_rate.gaps(runs.filter(pl.col("seed") != 1))  # a single seed says nothing of the noise
    assert gap.middle == pytest.approx(2.0) and math.isnan(gap.middle_low)


def test_a_loss_that_is_not_finite_is_the_greatest():
    losses = {("digits", "auto"): (1.0, math.nan), ("digits", "cosine"): (math.nan, 1.0)}
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.9, 0.9)}, losses)
    (gap,) = initial_rate.gaps(runs)
    assert gap.loss == math.inf


@pytest.mark.parametrize(("ours", "ratio"), [(0.0, 1.0), (0.1, math.inf)])
def test_a_least_loss_of_zero_is_no_divisor(ours, ratio):
    losses = {("digits", "auto"): (ours, 0.0), ("digits", "cosine"): (0.0, 1.0)}
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.9, 0.9)}, losses)
    (gap,) = initial_rate.gaps(runs)
    assert gap.loss == ratio


def test_where_auto_lr_falls_short_its_histories_are_drawn():
    runs = rate_runs({("digits-mlp", "cosine"): (0.5, 0.9), ("digits-mlp", "auto"): (0.9, 0.8)})
    (failure,) = initial_rate.gaps(runs)
    assert failure[:4] == ("digits-mlp", "sgd", 1.0, 1.0) and failure.best == pytest.approx(90.0)
    assert failure.worst == pytest.approx(10.0) and failure.middle == pytest.approx(5.0)
    figure = initial_rate.draw_failures(runs, [failure])
    # Two seeds of each, as the third is one that rates are chosen on.
    assert [len(axes.lines) for axes in figure.axes[:2]] == [4, 4]
    rates = {"auto": [1.0, 0.2, 0.7], "cosine": [1.0, 0.5, 0.0]}
    with_rates = runs.with_columns(rate=pl.Series([rates[schedule] for schedule in runs["schedule"]]))
    assert initial_rate.explain(with_rates, [failure]) == (
        "digits-mlp, sgd, x1: 10.0 points below. A third of the way its rate is 0.4 times that of cosine, "
        "and from there on at most 0.7 times cosine's highest. Its held-out loss is at worst 1.00 times "
        "cosine's least."
    )
    better = runs.with_columns(test_metric=pl.lit(0.9))
    (gap,) = initial_rate.gaps(better)
    assert gap.worst == pytest.approx(0.0)
