"""Studies: their numbers, that these are computed from the rows, and that the reports open."""

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
    polling_ablation,
    robustness,
    theory,
)
from experiments.studies.base import Job
from experiments.tasks import make_task
from tests.experiments.browser import HAS_BROWSER, open_and_click
from tests.experiments.figures import assert_is_drawn, lines_of


def history(*levels, steps=100):
    """A loss with these levels, each for an equal part of the steps."""
    return np.repeat(levels, steps // len(levels)).tolist()


def greedy_runs(baseline, greedy, seeds=2):
    rows = []
    for seed in range(seeds):
        for schedule, loss in (("linear", baseline), ("GreedyLR", greedy)):
            rows.append(
                dict(
                    task="tagging", optimizer="adamw", schedule=schedule, learning_rate=0.1, seed=seed,
                    steps=100, label="tagging",
                    loss=(np.array(loss) + 0.01 * seed * (schedule == "linear")).tolist(),
                )
            )  # fmt: skip
    return pl.DataFrame(rows)


def test_an_experiment_is_compared_as_in_the_paper():
    table = greedylr.summarize(greedy_runs(history(2.0, 1.0), history(1.95, 1.5)))
    row = table.row(0, named=True)
    assert (row["kind"], row["schedule"]) == ("tagging", "linear")
    assert (row["at_10"], row["at_50"], row["at_100"]) == ("yes*", "yes*", "no")
    # Baseline minus GreedyLR at the end: 1.0 - 1.5 and 1.01 - 1.5.
    assert row["difference"] == pytest.approx(-0.495)
    assert row["difference_low"] < -0.495 < row["difference_high"]


def test_a_diverged_baseline_is_dnf_and_a_diverged_greedy_run_has_the_higher_loss():
    diverged = history(1.0, math.nan)
    row = greedylr.summarize(greedy_runs(diverged, history(1.0, 1.0))).row(0, named=True)
    assert row["at_100"] == "dnf" and row["difference"] is None
    row = greedylr.summarize(greedy_runs(history(1.0, 1.0), diverged)).row(0, named=True)
    assert row["at_100"] == "no" and row["difference"] is None


def test_tables_ii_to_iv_are_computed_from_the_published_tables():
    got = greedylr.tally(greedylr.published())
    # Table III's final figures are not those of Tables V to X (nor of Table IV, which agrees with them).
    wrong = {"final as good or better, %", "final worse, %", "average benefit", "as good or better at 50%, %"}
    assert {name for name in got if got[name] != greedylr.PRINTED[name]} == wrong
    assert got["final as good or better, %"] == got["as good or better at 100%, %"] == "85.94"
    assert got["as good or better at 50%, %"] == "81.82"  # printed 81.81


def leader_runs():
    """Two tasks, one seed: the tuned cosine has a loss of 0.5 after three quarters of the steps."""
    evaluations = leaderboard.EVALUATIONS
    falling = np.linspace(1.0, 0.4, evaluations)
    falling[leaderboard._TARGET_AT] = 0.5
    rows = [
        dict(task=task, optimizer="adamw", schedule="cosine", learning_rate=rate, seed=seed, seconds=1.0,
             label="", test_losses=(falling + extra).tolist())
        for task in ("a", "b") for seed in (1000, 1001) for rate, extra in ((0.1, 0.0), (0.2, 0.3))
    ]  # fmt: skip
    for index, each in enumerate(leaderboard.SUBMISSIONS):
        for task in ("a", "b"):
            losses = np.ones(evaluations)
            if not (task == "b" and index > 0):
                losses[min(evaluations - 1, 3 + index) :] = 0.5
            rows.append(
                dict(task=task, optimizer=each.optimizer, schedule=each.schedule,
                     learning_rate=each.learning_rate, seed=0, seconds=2.0, label=each.name,
                     test_losses=losses.tolist())
            )  # fmt: skip
    return pl.DataFrame(rows)


def test_the_leaderboard_times_submissions_until_the_target():
    runs = leader_runs()
    assert leaderboard.targets(runs) == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}
    measured = leaderboard.time_to_target(runs)
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


def test_a_target_that_no_submission_reaches_counts_against_all():
    times = np.array([[1.0, math.inf], [1.0, math.inf]])
    np.testing.assert_array_equal(leaderboard.score(times), [0.5, 0.5])
    np.testing.assert_array_equal(leaderboard.profile(times, np.array([1.0, 4.0])), np.full((2, 2), 0.5))


def test_recovery_counts_the_steps_until_the_loss_has_recovered():
    name = "drift, 1, parameters"  # maximum at the end of the middle half
    at = 149
    loss = np.ones(200)
    loss[at + 1 : at + 11] = 5.0
    assert robustness.recovery(loss, name, 0) == 10.0
    assert robustness.recovery(np.ones(200), name, 0) == 0.0
    loss[at + 1 :] = 5.0
    assert robustness.recovery(loss, name, 0) == math.inf
    loss[at + 1 :] = math.nan
    assert robustness.recovery(loss, name, 0) == math.inf


def robust_row(schedule, disturbance, level):
    return dict(
        task="t", schedule=schedule, seed=0, disturbance=disturbance, loss=history(10.0, level, steps=200)
    )


def test_damage_is_relative_to_the_same_schedule_and_the_final_loss_to_the_constant_rate():
    noise = "gaussian, 1, gradient"
    rows = [robust_row("constant", "none", 2.0), robust_row("GreedyLR", "none", 1.0)]
    rows += [robust_row("constant", noise, 6.0), robust_row("GreedyLR", noise, math.nan)]
    measured = robustness.run_metrics(pl.DataFrame(rows))
    got = {
        (row["schedule"], row["target"]): (row["final"], row["damage"])
        for row in measured.iter_rows(named=True)
    }
    assert got["GreedyLR", "undisturbed"] == (0.5, 1.0)
    assert got["constant", "gradient"] == (3.0, 3.0)
    assert got["GreedyLR", "gradient"] == (math.inf, math.inf)


def test_saved_steps_count_from_where_the_metric_of_the_baseline_is_permanently_reached():
    def rows(final, metrics):
        return pl.DataFrame({"test_metric": [final] * 2, "test_metrics": [metrics] * 2})

    baseline = rows(0.8, [0.1, 0.8])
    assert lrtuner.saved(rows(0.9, [0.2, 0.5, 0.8, 0.9]), baseline) == pytest.approx(25.0)
    assert lrtuner.saved(rows(0.9, [0.9, 0.5, 0.8, 0.9]), baseline) == pytest.approx(25.0)  # permanently
    assert lrtuner.saved(rows(0.9, [0.9, 0.9, 0.8, 0.9]), baseline) == pytest.approx(75.0)
    assert lrtuner.saved(rows(0.7, [0.2, 0.9, 0.7, 0.7]), baseline) is None


def polling_runs():
    """Two seeds of two schedules from the best rate and from 200 times that, five evaluations."""
    rows = [
        dict(task="digits", optimizer="sgd", schedule=schedule, seed=seed, label=label,
             learning_rate=0.1 * (1 if label == polling.BEST else 200), test_metric=metric + 0.01 * seed,
             test_loss=1.0, test_losses=[metric] * 5, rate=[0.1] * 5)
        for seed in (0, 1)
        for label, metrics in ((polling.BEST, (0.8, 0.9)), (polling.LARGE, (0.1, 0.7)))
        for schedule, metric in zip(("constant", "polling-5(every=22)"), metrics, strict=True)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_polling_is_compared_with_the_constant_rate_from_each_start(monkeypatch):
    monkeypatch.setattr(polling, "TASKS", ("digits",))
    table = polling.summarize(polling_runs())
    starts = {(row["start"], row["schedule"]): row for row in table.iter_rows(named=True)}
    assert starts["best", "polling-5"]["difference"] == pytest.approx(10.0)
    assert starts["200 x best", "polling-5"]["difference"] == pytest.approx(60.0)
    cells = {(cell[1], cell[2]): cell for cell in polling._cells(table)}
    assert cells["polling, 5 factors", "best"][-1] == "87.0"  # printed for the best rate only
    assert cells["polling, 5 factors", "200 x best"][-1] == ""
    lines = lines_of(polling.draw(polling_runs(), ("polling-5",)).axes[0])
    np.testing.assert_allclose(lines["constant"][1], 0.8)  # from the best rate only
    np.testing.assert_allclose(lines["polling, 5 factors"][1], 0.9)


@pytest.mark.parametrize(
    ("label", "count"), [("gaussian, 1, parameters", 1), ("gaussian, 0.5, parameters", 0)]
)
def test_recovery_is_drawn_for_perturbations_of_strength_one(label, count):
    runs = pl.DataFrame([robust_row("constant", label, 1.0), robust_row("constant", "none", 1.0)])
    assert len(robustness._after_perturbation(runs, "t", "constant")) == count


def test_polling_at_every_step_is_a_variant_of_its_own():
    runs = polling_runs()
    stepwise = runs.filter(pl.col("schedule") != "constant").with_columns(
        schedule=pl.lit("polling-5(every=1)"), test_metric=pl.col("test_metric") - 0.3
    )
    table = polling.summarize(pl.concat([runs, stepwise])).filter(start="best")
    assert dict(table.select("schedule", "difference").iter_rows()) == pytest.approx(
        {"constant": 0.0, "polling-5": 10.0, "polling-5(every=1)": -20.0}
    )
    assert [cell[1] for cell in polling._cells(table)][-1] == "polling, 5 factors, every step"


def test_the_ablation_of_polling_has_a_row_for_each_variant(monkeypatch):
    monkeypatch.setattr(polling_ablation, "REDUCED", ("digits",))
    rows = [
        {"task": task, "schedule": schedule, "label": label, "seed": seed, "test_metric": metric + 0.1 * seed}
        for task, lower in (("digits-mlp", 0.0), ("mnist1d-mlp", 0.2), ("digits", 0.4))
        for label in (polling_ablation.GOOD, polling_ablation.LARGE)
        for schedule, metric in (
            ("constant", 0.8 - lower),
            *(
                (polling_ablation._schedule(each, make_task(task).steps_per_epoch), 0.7 - lower)
                for each in polling_ablation.variants(reduced=task == "digits")
            ),
        )
        for seed in range(2)
    ]
    table = polling_ablation.summarize(pl.DataFrame(rows))
    assert len(table) == 2 * (1 + len(polling_ablation.variants()))
    best = table.row(0, named=True)
    assert (best["score"], best["label"], best["every"]) == ("constant", polling_ablation.GOOD, None)
    assert best["accuracy"] == pytest.approx(75) and best["worst"] == pytest.approx(60)
    assert best["digits"] == pytest.approx(45) and best["digits-mlp"] == pytest.approx(85)
    assert table.filter(pl.col("normalize") == "none")["digits"].is_null().all()
    # Once per epoch is one variant, although epochs differ in length.
    assert set(table["every"].drop_nulls()) == {polling_ablation.EPOCH, 1, 5}
    lines = lines_of(polling_ablation.draw(table).axes[0])
    assert set(lines) == {"every 1 steps", "every 5 steps", "once per epoch", "constant rate"}


def test_every_listed_study_can_be_loaded():
    for name, study in STUDIES.items():
        assert callable(study.load()), name
        assert study.summary


def shrink(monkeypatch, study):
    """Reduces a study to a few seconds on the smallest tasks."""
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
        "polling-ablation": {"tasks": {"digits-mlp": 0.1}, "steps": 40, "seeds": 1},
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
        "polling-ablation": polling_ablation,
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
    if study == "polling-ablation":
        monkeypatch.setattr(polling_ablation, "REDUCED", ())
        monkeypatch.setattr(polling_ablation, "NORMALIZATIONS", ("minmax",))
        monkeypatch.setattr(polling_ablation, "SCORES", ("exponential", "inverse"))
    return modules[study]


RECOMPUTED = {
    "greedylr": lambda runs: {"table": greedylr.summarize(runs)},
    "robustness": lambda runs: {
        "table": robustness.summarize(robustness.run_metrics(runs)),
        "against": robustness.compare(robustness.run_metrics(runs)),
    },
    "initial-rate": lambda runs: {
        "table": initial_rate.summarize(runs),
        "gaps": pl.DataFrame(initial_rate.gaps(runs)),
    },
    "lrtuner": lambda runs: {"table": lrtuner.summarize(runs)},
    "polling": lambda runs: {"table": polling.summarize(runs)},
    "polling-ablation": lambda runs: {"table": polling_ablation.summarize(runs)},
    "hypergradient": lambda runs: {"table": hypergradient.summarize(runs)},
    "theory": lambda runs: {"table": theory.summarize(runs)},
    "leaderboard": lambda runs: {
        "scores": leaderboard.summarize(leaderboard.time_to_target(runs)),
        "tasks": leaderboard.by_task(leaderboard.time_to_target(runs)),
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
            expected, got = table[column].to_list(), written[column].to_list()
            assert [str(a) if isinstance(a, str) else a for a in expected] == pytest.approx(
                [str(b) if isinstance(a, str) else b for a, b in zip(expected, got, strict=True)], nan_ok=True
            ), column
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    for picture in pictures:
        assert_is_drawn(picture)
    page = (tmp_path / "report.html").read_text()
    assert f"Command: python -m experiments study {study} --preset quick." in page
    if HAS_BROWSER:
        open_and_click(tmp_path / "report.html")


def rate_runs(accuracies, losses=None, seeds=(0, 1, 1000), spread=0.0):
    """Runs of three steps; accuracies and losses by task, schedule and rate (0.1 and 1 times the best)."""
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
                        "label": f"{rate:g}",
                        "seed": seed,
                        "test_metric": accuracy + spread * (seed == 1) * (schedule == "auto"),
                        "test_loss": (losses or {}).get((task, schedule), (1.0, 1.0))[number],
                        "loss": [2.0, 1.0, 1.0 - accuracy],
                        "rate": [rate, rate, rate],
                    }
                )
    return pl.DataFrame(rows)


def test_the_conclusion_on_initial_rates_compares_the_worst_with_the_best_of_cosine():
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
    text = initial_rate.conclude(initial_rate.gaps(runs))
    assert "Over 1 pairs of the development tasks" in text and "for 1 (maximum gap 1.5)" in text
    # Digits because of its loss, 0.54 against 0.5; tagging because all of its losses are equal.
    assert "Over 2 pairs of the other tasks" in text and "for 0 (maximum gap 10.0)" in text
    assert "of cosine for 2, and at least one of them holds for 2" in text
    # The medians are 0.75, 1.5 and 10 points below cosine, equally in each seed.
    assert "for 0 (maximum mean gap 10.0 points)" in text


def test_a_median_gap_is_not_significant_if_seeds_disagree():
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.88, 0.88)}, spread=0.1)
    (gap,) = initial_rate.gaps(runs)
    assert gap.middle == pytest.approx(-3.0) and gap.middle_low < -3 < 0 < gap.middle_high
    (gap,) = initial_rate.gaps(runs.filter(pl.col("seed") != 1))  # no interval for a single seed
    assert gap.middle == pytest.approx(2.0) and math.isnan(gap.middle_low)


def test_a_loss_that_is_not_finite_is_the_maximum():
    losses = {("digits", "auto"): (1.0, math.nan), ("digits", "cosine"): (math.nan, 1.0)}
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.9, 0.9)}, losses)
    (gap,) = initial_rate.gaps(runs)
    assert gap.loss == math.inf


@pytest.mark.parametrize(("loss", "ratio"), [(0.0, 1.0), (0.1, math.inf)])
def test_the_ratio_to_a_minimum_loss_of_zero_is_one_or_infinite(loss, ratio):
    losses = {("digits", "auto"): (loss, 0.0), ("digits", "cosine"): (0.0, 1.0)}
    runs = rate_runs({("digits", "cosine"): (0.5, 0.9), ("digits", "auto"): (0.9, 0.9)}, losses)
    (gap,) = initial_rate.gaps(runs)
    assert gap.loss == ratio


def test_the_histories_of_large_gaps_are_drawn():
    runs = rate_runs({("digits-mlp", "cosine"): (0.5, 0.9), ("digits-mlp", "auto"): (0.9, 0.8)})
    (large,) = initial_rate.gaps(runs)
    assert large[:4] == ("digits-mlp", "sgd", 1.0, 1.0) and large.best == pytest.approx(90.0)
    assert large.worst == pytest.approx(10.0) and large.middle == pytest.approx(5.0)
    figure = initial_rate.draw_large(runs, [large])
    # Two seeds of each; the third is a tuning seed.
    assert [len(axes.lines) for axes in figure.axes[:2]] == [4, 4]
    lines = lines_of(figure.axes[0])
    np.testing.assert_allclose(lines["auto, x1"][1], [2.0, 1.0, 0.2])
    np.testing.assert_allclose(lines["cosine, x1"][1], [2.0, 1.0, 0.1])
    rates = {"auto": [1.0, 0.2, 0.7], "cosine": [1.0, 0.5, 0.0]}
    with_rates = runs.with_columns(rate=pl.Series([rates[schedule] for schedule in runs["schedule"]]))
    assert initial_rate.explain(with_rates, [large]) == (
        "digits-mlp, sgd, x1: 10.0 points below. After a third of the steps its learning rate is 0.4 times "
        "that of cosine; the maximum from then on is 0.7 times the maximum of cosine. Its maximum held-out "
        "loss is 1.00 times the minimum of cosine."
    )
    better = runs.with_columns(test_metric=pl.lit(0.9))
    (gap,) = initial_rate.gaps(better)
    assert gap.worst == pytest.approx(0.0)
