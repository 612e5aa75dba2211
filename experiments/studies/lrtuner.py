"""Tables 1 to 4 of "LRTuner: A Learning Rate Tuner for Deep Neural Networks" on small tasks: LRTuner against
hand-tuned schedules, and the steps that it saves.

The paper trains ResNets on ImageNet and CIFAR-10 with momentum and a step schedule, fine-tunes BERT on SQuAD
with AdamW and a linear one, and trains a transformer on IWSLT with Adam, warmup and an inverse square root.
This study has the same pairs on its own tasks. The baseline's initial rate is the best of a grid on seeds
that are not reported. LRTuner runs twice: with the settings of the paper's Table 5, and with the defaults of
this library from the baseline's rate. BLEU and F1 are those of the final parameters (the paper takes the
checkpoint with the lowest validation loss for BLEU).
"""

import math
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.palette import Look
from experiments.reporting.summary import confidence_interval, interval_text, stage_losses
from experiments.reporting.tables import print_table
from experiments.studies import lrtuner_appendix
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, best_rates, reported
from experiments.tasks import make_task
from experiments.training.engine import RunSpec, Settings, make_specs
from experiments.training.sweep import Group

BASELINE, PAPER, OURS = "baseline", "LRTuner, paper's settings", "LRTuner, our defaults"
LOOKS = {BASELINE: Look(drawing.ORANGE), PAPER: Look(drawing.BLUE), OURS: Look(drawing.BLUE, ":")}
EVALUATIONS = 20
SAMPLES, SUPERBATCH, ROLLBACK = 5, 100, 1.0  # of the paper


class Case(NamedTuple):
    """A table of the paper and its counterpart in this study.

    Attributes:
      table: number of the paper's table; empty if there is none.
      paper: what the paper reports.
      task: of this study.
      optimizer: of the paper and of this study.
      schedule: of the baseline.
      rates: the grid of the baseline's initial rate.
      start: LRTuner's initial rate in the paper over the peak of the baseline's.
      explore: explore epochs over all epochs (Table 5).
      saturation: saturation threshold (Table 5).
      bound: cube root of the epsilon threshold over the initial rate (Table 5).
    """

    table: str
    paper: str
    task: str
    optimizer: str
    schedule: str
    rates: tuple[float, ...]
    start: float = 1.0
    explore: float = 0.25
    saturation: float = 100.0
    bound: float = 1.0

    @property
    def title(self) -> str:
        """The heading in figures and reports."""
        number = f"Table {self.table}: " if self.table else ""
        return f"{number}{self.task}, {self.optimizer}, {self.schedule}"

    @property
    def paper_schedule(self) -> str:
        """LRTuner with the settings of the paper."""
        settings = {
            "explore": self.explore,
            "bound": self.bound,
            "samples": SAMPLES,
            "saturation": self.saturation,
            "rollback": ROLLBACK,
            "superbatch": SUPERBATCH,
        }
        return f"LRTuner({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


CASES = (
    Case(
        "1",
        "ImageNet, ResNet-50, momentum: top-1 76.06 against 75.87%, baseline reached in 29% fewer steps",
        "digits-resnet",
        "momentum",
        "step",
        (0.01, 0.03, 0.1, 0.3),
        explore=25 / 90,
        saturation=500.0,
    ),
    Case(
        "2",
        "CIFAR-10, ResNet-18, momentum: 94.79 against 94.81%",
        "digits",
        "momentum",
        "step",
        (0.01, 0.03, 0.1, 0.3),
        explore=0.5,
    ),
    Case(
        "3",
        "SQuAD, BERT, AdamW: exact match 81.2 against 80.7%, F1 88.5 against 88.2%, baseline reached in 20% "
        "fewer steps",
        "question-answering",
        "adamw",
        "linear",
        (1e-3, 3e-3, 1e-2),
        saturation=2.0,
        bound=5.0,
    ),
    Case(
        "4",
        "IWSLT, transformer, Adam: BLEU 34.88 against 34.70, validation perplexity 4.86 against 5.10, "
        "baseline reached in 24% fewer steps",
        "translation-fr",
        "adamw",
        "inverse-sqrt",
        (1e-3, 3e-3, 1e-2),
        start=1 / 50,
        explore=0.2,
        saturation=5.0,
        bound=215.0,
    ),
)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"steps": 400, "seeds": 3},
    "full": {"steps": 2000, "seeds": 7},
}


def choose_cases(job: Job) -> list[Case]:
    """The cases of the paper, or those of ``--task`` and ``--optimizer``.

    Tasks that are in no case have a step schedule and the settings of CIFAR-10.
    """
    cases = []
    for task in job.tasks([case.task for case in CASES]):
        known = next((case for case in CASES if case.task == task), None)
        for optimizer in job.optimizers((known.optimizer if known else "momentum",)):
            if known and known.optimizer == optimizer:
                cases.append(known)
            else:
                rates = make_task(task).learning_rates[optimizer]
                schedule = known.schedule if known else "step"
                cases.append(Case("", "not in the paper", task, optimizer, schedule, rates, explore=0.5))
    return cases


def run(job: Job) -> None:
    """Trains all runs and writes rows, table, figures and report; resumes an interrupted job."""
    chosen, cases = PRESETS[job.preset], choose_cases(job)
    settings = Settings(chosen["steps"], EVALUATIONS, text=True)
    sweep = Sweep(job, settings, {"preset": chosen, "cases": cases})
    tuning = [
        Group(case.task, case.optimizer, make_specs((case.schedule,), case.rates, TUNING_SEEDS))
        for case in cases
    ]
    best = best_rates(sweep.train(tuning, keep_programs=True))
    groups = []
    for case in cases:
        rate = best[case.task, case.optimizer]
        variants = (
            (case.schedule, rate, BASELINE),
            (case.paper_schedule, case.start * rate, PAPER),
            ("LRTuner", rate, OURS),
        )
        specs = [
            RunSpec(schedule, start, seed, label=label)
            for schedule, start, label in variants
            for seed in range(chosen["seeds"])
        ]
        groups.append(Group(case.task, case.optimizer, specs))
    sweep.train(groups, keep_programs=True)
    runs = sweep.finish()
    table = summarize(runs)
    print_table(job.console, "LRTuner against hand-tuned schedules", _HEADERS, _cells(table), left=5)
    conclusion = conclude(table)
    job.console.print(conclusion)
    rates = {case: best[case.task, case.optimizer] for case in cases}
    fits, deviations = lrtuner_appendix.measure(
        [(case.task, case.optimizer, rate, case.bound) for case, rate in rates.items()], chosen["steps"]
    )
    publish(
        job,
        "LRTuner against hand-tuned schedules",
        f"{chosen['steps']} steps, {chosen['seeds']} seeds, mean (standard deviation). Steps saved: steps "
        "before the end, in percent of all steps, at which LRTuner's held-out metric (mean over seeds, "
        "evaluated every 5% of the steps) permanently reaches the baseline's final one; none if it does not. "
        f"Perplexity: exponential of the mean loss per word. {conclusion}",
        tables={"table": table, "fits": fits, "deviations": deviations},
        figures={
            "histories": draw(runs),
            "appendix_a": lrtuner_appendix.draw_fits(fits),
            "appendix_c": lrtuner_appendix.draw_deviations(deviations),
        },
        sections=[*_sections(runs, table), *lrtuner_appendix.sections(fits, deviations)],
        recomputed_by="experiments.studies.lrtuner.summarize and conclude",
        schedules=runs["schedule"].unique(maintain_order=True).to_list(),
    )


def case_of(task: str, optimizer: str, schedule: str) -> Case:
    """The case of the paper with this task and optimizer, or one without a number."""
    for case in CASES:
        if (case.task, case.optimizer) == (task, optimizer):
            return case
    return Case("", "not in the paper", task, optimizer, schedule, ())


def _by_case(runs: pl.DataFrame) -> list[tuple[Case, dict[str, pl.DataFrame]]]:
    """The reported runs of each case and variant, sorted by seed."""
    result = []
    for (task, optimizer), cell in reported(runs).group_by(["task", "optimizer"], maintain_order=True):
        variants = {label: cell.filter(label=label).sort("seed") for label in (BASELINE, PAPER, OURS)}
        result.append((case_of(task, optimizer, variants[BASELINE]["schedule"][0]), variants))
    return result


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each case and variant.

    Returns:
      A frame with ``table``, ``task``, ``optimizer``, ``variant``, ``learning_rate``; means and standard
      deviations of the final training loss (``loss``, ``loss_deviation``) and of the held-out metric in
      percent (``metric``, ``metric_deviation``); ``difference`` of the metric from the baseline's, paired by
      seed, with its 95% confidence interval; ``test_loss``, the mean held-out loss; ``score``: the name of
      the text score, with ``text_score`` and ``text_deviation`` (NaN on tasks without one); ``saved``:
      percent of the steps saved to reach the baseline's metric, or None.
    """
    rows = []
    for case, variants in _by_case(runs):
        baseline = variants[BASELINE]
        score = make_task(case.task).text
        for label, own in variants.items():
            losses = np.array([stage_losses(np.array(loss, float))[100] for loss in own["loss"].to_list()])
            differences = 100 * (own["test_metric"] - baseline["test_metric"]).to_numpy()
            low, high = confidence_interval(differences)
            rows.append(
                {
                    "table": case.table,
                    "task": case.task,
                    "optimizer": case.optimizer,
                    "variant": label,
                    "learning_rate": own["learning_rate"][0],
                    "loss": float(losses.mean()),
                    "loss_deviation": float(losses.std(ddof=1)),
                    "metric": 100 * float(own["test_metric"].mean()),
                    "metric_deviation": 100 * float(own["test_metric"].std()),
                    "difference": float(differences.mean()),
                    "difference_low": low,
                    "difference_high": high,
                    "test_loss": float(own["test_loss"].mean()),
                    "score": "" if score is None else score.name,
                    "text_score": float(own["text_score"].mean()),
                    "text_deviation": float(own["text_score"].std()),
                    "saved": None if label == BASELINE else saved(own, baseline),
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def conclude(table: pl.DataFrame) -> str:
    """Where each variant of LRTuner is significantly above or below the baseline."""
    sentences = []
    for label in (PAPER, OURS):
        own = table.filter(variant=label).fill_nan(None)  # Polars orders NaN above all numbers
        above, below = own.filter(pl.col("difference_low") > 0), own.filter(pl.col("difference_high") < 0)
        reached = own.filter(pl.col("saved").is_not_null())
        sentences.append(
            f"{label}: held-out metric significantly above the baseline's on {len(above)}, below on "
            f"{len(below)} of {len(own)} tasks (95% confidence over seeds); reaches the baseline's final "
            f"metric and stays there on {len(reached)}."
        )
    return " ".join(sentences)


def saved(own: pl.DataFrame, baseline: pl.DataFrame) -> float | None:
    """Percent of the steps saved to reach the baseline's final metric permanently, for means over seeds.

    Permanently: the metric stays at or above it until the end. None if it ends below it.
    """
    target = baseline["test_metric"].mean()
    history = np.array(own["test_metrics"].to_list()).mean(axis=0)
    below = np.flatnonzero(history < target)
    needed = below[-1] + 2 if len(below) else 1
    return 100 * (1 - needed / len(history)) if needed <= len(history) else None


_HEADERS = (
    "table",
    "task",
    "optimizer",
    "variant",
    "rate",
    "training loss",
    "held-out metric, %",
    "difference [95% CI]",
    "perplexity, training",
    "held out",
    "text score, %",
    "steps saved",
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    cells = []
    for row in table.iter_rows(named=True):
        is_rule = row["variant"] != BASELINE
        steps = "none" if row["saved"] is None else f"{row['saved']:.0f}%"
        # Perplexity is a measure of text that is generated word by word, as BLEU is.
        perplexities = [row["loss"], row["test_loss"]] if row["score"] == "BLEU" else []
        text = f"{row['score']} {row['text_score']:.2f} ({row['text_deviation']:.2f})" if row["score"] else ""
        cells.append(
            [
                row["table"],
                row["task"],
                row["optimizer"],
                row["variant"],
                f"{row['learning_rate']:g}",
                f"{row['loss']:.3g} ({row['loss_deviation']:.1g})",
                f"{row['metric']:.2f} ({row['metric_deviation']:.2f})",
                interval_text(row, "+.2f") if is_rule else "",
                *([f"{math.exp(min(value, 99)):.3g}" for value in perplexities] or ["", ""]),
                text,
                steps if is_rule else "",
            ]
        )
    return cells


_HISTORIES = (("loss", "training loss"), ("test_metrics", "held-out metric"), ("rate", "learning rate"))


def _mean(own: pl.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean history over seeds, losses smoothed over 5% of the steps, and its percents of the steps."""
    values = np.array(own[column].to_list(), float).mean(axis=0)
    steps = drawing.percent_of_steps(len(values))
    if column == "loss":
        width = max(1, len(values) // 20)
        values, steps = drawing.smooth(values, width), steps[width - 1 :]
    return steps, values


def draw(runs: pl.DataFrame) -> plt.Figure:
    """Loss, held-out metric and rate of each case, as in the paper's figures 5 to 8."""
    cases = _by_case(runs)
    figure, panels = drawing.panels(3 * len(cases), len(cases), width=4.0, height=2.8)
    for column, (case, variants) in enumerate(cases):
        for row, (name, title) in enumerate(_HISTORIES):
            axes = panels[row * len(cases) + column]
            for label, own in variants.items():
                axes.plot(*_mean(own, name), **LOOKS[label].matplotlib(), lw=1.5, label=label)
            axes.set_ylabel(title)
            axes.set_xlabel("steps, %")
            if name != "test_metrics":
                axes.set_yscale("log")
            if row == 0:
                axes.set_title(case.title.replace(": ", ":\n"), fontsize=9)
    drawing.add_legend(figure, panels[0])
    figure.suptitle("Means over seeds", fontsize=12)
    return figure


def _sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for case, variants in _by_case(runs):
        own = table.filter(task=case.task, optimizer=case.optimizer)
        parts: list[Any] = [html.Table(_HEADERS, _cells(own))]
        for name, title in _HISTORIES:
            curves = [
                html.Curve(label, *_mean(cell, name), LOOKS[label].plotly())
                for label, cell in variants.items()
            ]
            parts.append(html.line_figure(curves, "steps, %", title, y_log=name != "test_metrics"))
        sections.append(html.Section(case.title, f"Paper: {case.paper}.", parts))
    return sections
