"""Studies: their numbers, that these are computed from the rows, and that the reports open."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow_datasets as tfds
from rich.console import Console

from experiments.errors import UsageError
from experiments.studies import (
    STUDIES,
    check_options,
    finetune,
    greedylr,
    hypergradient,
    leaderboard,
    lrtuner,
    lrtuner_appendix,
    polling,
    polling_ablation,
    rate_sensitivity,
    robustness,
    theory,
)
from experiments.studies.base import Job, Selection
from experiments.tasks import make_task
from experiments.training.engine import OPTIMIZERS
from experiments.training.schedules import parse
from tests.experiments import test_finetune_study
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


def test_a_diverged_run_is_not_significantly_lower():
    """Polars orders NaN, here the bounds of an unknown interval, above all numbers."""
    diverged = history(1.0, math.nan)
    told = greedylr._conclude(greedylr.summarize(greedy_runs(history(1.0, 1.0), diverged)))
    assert "significantly lower in 0 and significantly higher in 0 " in told and told.endswith(
        "in 1 it diverges."
    )
    told = greedylr._conclude(greedylr.summarize(greedy_runs(history(2.0, 1.0), history(2.0, 0.5))))
    assert "significantly lower in 1 and significantly higher in 0 " in told and told.endswith(
        "in 0 it diverges."
    )
    variants = [
        dict(variant=label, saved=None, difference_low=math.nan, difference_high=math.nan)
        for label in (lrtuner.PAPER, lrtuner.OURS)
    ]
    table = pl.DataFrame(variants, schema_overrides={"saved": pl.Float64})
    assert lrtuner.conclude(table).count("baseline's on 0, below on 0 of 1 tasks") == 2


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
        "greedylr": {"tasks": 1, "fine_tuned": 0, "rates": 1, "steps": 40, "seeds": 2},
        "robustness": {"tasks": ("quadratic-10", "digits-mlp"), "steps": 100, "seeds": 1},
        "rate-sensitivity": {
            "tasks": ("digits-mlp",),
            "schedules": rate_sensitivity.SCHEDULES,
            "steps": 30,
            "seeds": 2,
        },
        "lrtuner": {"steps": 40, "seeds": 2},
        "polling": {"steps": 40, "seeds": 2},
        "polling-ablation": {"tasks": {"digits-mlp": 0.1}, "steps": 40, "seeds": 1},
        "hypergradient": {"steps": 40, "seeds": 2},
        "theory": {"starts": 2},
        "leaderboard": {"tasks": ("quadratic-10", "ackley"), "steps": 40, "seeds": 2},
        "finetune": test_finetune_study.SMALL,
    }
    modules = {
        "greedylr": greedylr,
        "robustness": robustness,
        "rate-sensitivity": rate_sensitivity,
        "lrtuner": lrtuner,
        "polling": polling,
        "polling-ablation": polling_ablation,
        "hypergradient": hypergradient,
        "theory": theory,
        "leaderboard": leaderboard,
        "finetune": finetune,
    }
    monkeypatch.setitem(modules[study].PRESETS, "quick", presets[study])
    if study == "greedylr":
        small = {"tagging": ("X", ("digits-mlp",)), "summarization": ("IX", ("mnist1d-mlp",))}
        monkeypatch.setattr(greedylr, "KINDS", small)
        monkeypatch.setattr(
            greedylr, "SHOWN", (("tagging", "adagrad"), ("summarization", "sgd"), ("tagging", "adamw"))
        )
        monkeypatch.setattr(greedylr, "LEARNING_RATES", dict.fromkeys(OPTIMIZERS, (0.01, 0.01)))
    if study == "rate-sensitivity":
        monkeypatch.setattr(rate_sensitivity, "OPTIMIZERS", ("sgd",))
    if study == "lrtuner":
        cases = tuple(
            case._replace(task="digits-mlp", table=str(i)) for i, case in enumerate(lrtuner.CASES[1:3])
        )
        monkeypatch.setattr(lrtuner, "CASES", cases[:1])
        monkeypatch.setattr(lrtuner, "SUPERBATCH", 3)
        monkeypatch.setattr(lrtuner_appendix, "SIZES", (1, 2))
    if study == "finetune":
        test_finetune_study.use_tiny_networks(monkeypatch)
    if study == "polling":
        monkeypatch.setattr(polling, "TASKS", ("digits-mlp",))
    if study == "polling-ablation":
        monkeypatch.setattr(polling_ablation, "REDUCED", ())
        monkeypatch.setattr(polling_ablation, "NORMALIZATIONS", ("minmax",))
        monkeypatch.setattr(polling_ablation, "SCORES", ("exponential", "inverse"))
    return modules[study]


RECOMPUTED = {
    "greedylr": lambda runs: {
        "table": greedylr.summarize(runs),
        "further": greedylr.summarize(runs, "exponential"),
    },
    "robustness": lambda runs: {
        "table": robustness.summarize(robustness.run_metrics(runs)),
        "against": robustness.compare(robustness.run_metrics(runs)),
    },
    "rate-sensitivity": lambda runs: {"table": rate_sensitivity.summarize(runs)},
    "lrtuner": lambda runs: {"table": lrtuner.summarize(runs)},
    "polling": lambda runs: {"table": polling.summarize(runs)},
    "polling-ablation": lambda runs: {"table": polling_ablation.summarize(runs)},
    "hypergradient": lambda runs: {"table": hypergradient.summarize(runs)},
    "theory": lambda runs: {"table": theory.summarize(runs)},
    "finetune": lambda runs: {
        "table": finetune.summarize(runs),
        "claims": finetune.compare(runs),
        "recovery": finetune.recovery_table(runs),
    },
    "leaderboard": lambda runs: {
        "scores": leaderboard.summarize(leaderboard.time_to_target(runs)),
        "tasks": leaderboard.by_task(leaderboard.time_to_target(runs)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("study", RECOMPUTED)
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


@pytest.mark.slow
@pytest.mark.parametrize("study", ["greedylr", "hypergradient", "rate-sensitivity", "leaderboard", "lrtuner"])
def test_a_study_trains_the_given_task_with_the_given_optimizer(study, tmp_path, monkeypatch):
    module = shrink(monkeypatch, study)
    monkeypatch.setattr(rate_sensitivity, "SCHEDULES", ("cosine", "auto"))
    console = Console(record=True, width=200)
    task = "imdb-transformer" if study == "greedylr" else "mnist1d-mlp"  # a step of the former takes a second
    selection = Selection(task=task, optimizer="adam")
    with tfds.testing.mock_data(num_examples=70):
        make_task.cache_clear()
        module.run(Job(study, "quick", tmp_path, console, selection=selection))
        make_task.cache_clear()
    runs = pl.read_parquet(tmp_path / "runs.parquet")
    if study != "hypergradient":
        assert set(runs["task"]) == {task} and "adam" in set(runs["optimizer"])
    page = (tmp_path / "report.html").read_text()
    assert f"{study} --preset quick --task {task} --optimizer adam." in page


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("option", ["task", "optimizer"])
def test_every_study_reads_its_options_first(study, option, tmp_path, monkeypatch):
    """An option that a study ignored would pass without an error."""
    for module in (greedylr, finetune):
        monkeypatch.setattr(module, "pretrain_for", lambda *_: pytest.fail("trained with a wrong option"))
    selection = Selection(**{option: "nope"})
    with pytest.raises(UsageError, match=f"--{option}"):
        check_options(study, selection)
        STUDIES[study].load()(Job(study, "quick", tmp_path, Console(quiet=True), selection=selection))


def test_the_ablation_of_polling_has_rates_of_sgd_only(tmp_path):
    job = Job(
        "polling-ablation", "quick", tmp_path, Console(quiet=True), selection=Selection(optimizer="adam")
    )
    with pytest.raises(UsageError, match="knows good rates of sgd only: leave out --optimizer"):
        polling_ablation.run(job)


def test_options_of_a_study_are_checked():
    selection = Selection(task="quadratic", optimizer="sgd,adam")
    job = Job("theory", "quick", Path("nowhere"), Console(), selection=selection)
    assert job.tasks(("pseudo-Huber",), theory.OBJECTIVES) == ("quadratic",)
    assert job.optimizers(("adamw",)) == ("sgd", "adam")
    with pytest.raises(UsageError, match=r"--task must be one or more of digits, .*got 'quadratic'"):
        job.tasks(())
    with pytest.raises(UsageError, match="--optimizer must be one name for study theory, got 'sgd,adam'"):
        job.one_optimizer("sgd")
    assert job._replace(selection=Selection()).tasks(("digits",)) == ("digits",)
    assert job.call.endswith("study theory --preset quick --task quadratic --optimizer sgd,adam")


def text_runs():
    """Two seeds of the three variants of LRTuner on translation."""
    rows = [
        dict(task="translation-fr", optimizer="adamw", schedule=schedule, label=label, seed=seed,
             learning_rate=rate, test_metric=metric + 0.01 * seed, test_metrics=[metric] * 4, test_loss=1.0,
             text_score=30.0 + seed, loss=[2.0] * 20, rate=[rate] * 20)
        for seed in (0, 1)
        for schedule, label, rate, metric in (
            ("inverse-sqrt", lrtuner.BASELINE, 0.1, 0.4),
            ("LRTuner(superbatch=100)", lrtuner.PAPER, 0.002, 0.3),
            ("LRTuner", lrtuner.OURS, 0.1, 0.5),
        )
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_lrtuner_reports_perplexity_and_bleu_on_text():
    table = lrtuner.summarize(text_runs())
    cells = dict(zip(lrtuner._HEADERS, lrtuner._cells(table)[0], strict=True))
    assert cells["perplexity, training"] == "7.39" and cells["held out"] == "2.72"
    assert cells["text score, %"] == "BLEU 30.50 (0.71)" and cells["table"] == "4"
    text = lrtuner.conclude(table)
    assert (
        "paper's settings: held-out metric significantly above the baseline's on 0, below on 1 of 1" in text
    )
    assert "our defaults: held-out metric significantly above the baseline's on 1, below on 0 of 1" in text


def test_the_settings_of_lrtuner_are_those_of_the_papers_table_5():
    text, answers = lrtuner.CASES[3], lrtuner.CASES[2]
    _, settings = parse(text.paper_schedule)
    assert settings == {
        "explore": 10 / 50,
        "bound": 215.0,
        "samples": 5,
        "saturation": 5.0,
        "rollback": 1.0,
        "superbatch": 100,
    }
    seed, peak = 1e-5, 5e-4
    assert text.start == seed / peak
    assert (text.bound * seed) ** 3 == pytest.approx(1e-8, rel=0.01)
    assert (answers.bound * 2e-5) ** 3 == pytest.approx(1e-12, rel=0.01)
    assert answers.saturation == 2.0 and answers.start == 1.0


@pytest.mark.slow
def test_the_parabola_of_a_quadratic_has_no_error_and_a_noisy_loss_deviates_less_in_larger_superbatches():
    fits, deviations = lrtuner_appendix.measure([("digits-mlp", "sgd", 0.1, 1.0)], 20)
    errors = lrtuner_appendix.fit_errors(fits)
    assert errors["within"].max() < 0.05
    assert len(fits) == 2 * (lrtuner_appendix.SAMPLES + lrtuner_appendix.TESTS + 1)
    proposed = fits.filter(pl.col("kind") != "tested")
    assert (proposed["epsilon"].abs() <= proposed["bound"] * (1 + 1e-6)).all()
    assert errors["beyond"].is_not_null().all()
    assert deviations["deviation"][-1] < deviations["deviation"][0] / 3


@pytest.mark.parametrize(("minimum", "bound", "is_clipped"), [(2.0, 2.0, True), (0.5, 2.0, False)])
def test_errors_of_the_fit_are_relative_to_the_range_of_the_losses(minimum, bound, is_clipped):
    def row(kind, epsilon, loss, parabola):
        about = {"task": "t", "optimizer": "sgd", "stage": 0.1, "bound": bound}
        return about | {"kind": kind, "epsilon": epsilon, "loss": loss, "parabola": parabola}

    rows = [row("fitted", epsilon, 1.0, 1.0) for epsilon in (-1.0, 0.0, 1.0)]
    rows += [row("tested", 0.5, 1.0, 1.1), row("tested", -2.0, 3.0, 2.0), row("minimum", minimum, 1.0, 1.4)]
    (errors,) = lrtuner_appendix.fit_errors(pl.DataFrame(rows)).iter_rows(named=True)
    assert errors["within"] == pytest.approx(0.05) and errors["beyond"] == pytest.approx(0.5)
    assert errors["at_minimum"] == pytest.approx(0.2) and errors["is_clipped"] is is_clipped
