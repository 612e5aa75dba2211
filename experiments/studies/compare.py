"""The command ``compare``: GreedyLR and common schedules with the same seeds, batches and initial rates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from experiments import welcome
from experiments.reporting import html, report, summary
from experiments.studies.base import Job, Sweep, publish
from experiments.tasks import make_task
from experiments.training.engine import Settings, device_mesh, make_specs, step_flops
from experiments.training.sweep import Group

SCHEDULES = ("constant", "linear", "cosine", "exponential", "plateau", "GreedyLR")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Comparison(NamedTuple):
    """The runs of a comparison.

    Attributes:
      task: a key of ``experiments.tasks.TASKS``.
      optimizers: keys of ``experiments.training.engine.OPTIMIZERS``.
      steps: training steps of a run, >= 20.
      seeds: number of runs with different initial parameters and batches, >= 1.
      learning_rates: initial learning rates, > 0; None: those of the task for each optimizer.
    """

    task: str
    optimizers: Sequence[str]
    steps: int
    seeds: int
    learning_rates: Sequence[float] | None = None


def compare(job: Job, comparison: Comparison) -> None:
    """Trains every schedule at every initial rate and seed, and writes rows, table, figures and report.

    Raises:
      UsageError: if the task is unknown or the output folder cannot be used.
    """
    task_name, optimizers, steps, seeds, learning_rates = comparison
    is_cached = welcome.cache_folder().exists()
    task = make_task(task_name)
    rates = {name: tuple(learning_rates or task.learning_rates[name]) for name in optimizers}
    described = {"compared": task_name, "seeds": seeds, "learning_rates": rates, "schedules": SCHEDULES}
    sweep = Sweep(job, Settings(steps), described)
    groups = [
        Group(task_name, optimizer, make_specs(SCHEDULES, rates[optimizer], range(seeds)))
        for optimizer in optimizers
    ]
    runs_each, devices = len(groups[0].specs), device_mesh().size
    duration = "see the bar for the time"
    if jax.default_backend() == "cpu":
        flops = [step_flops(task, name) for name in optimizers]
        seconds = welcome.estimate_seconds(flops, runs_each, steps, devices, is_cached=is_cached)
        duration = f"{welcome.duration_text(seconds)}, roughly"
    job.console.print(f"{runs_each * len(groups)} runs of {steps} steps, {devices} at a time: {duration}.")
    compilations = _CompilationCount()
    sweep.train(groups, keep_programs=True)
    runs = sweep.finish()
    compilations.stop()

    table = summary.summarize(runs)
    title = report.make_title(task_name, steps, seeds)
    conclusion = report.count_outcomes(table)
    job.console.print(report.rich_table(table, title, job.console.width))
    job.console.print(conclusion)
    job.console.print(
        f"{len(runs)} runs. Compilations: {sweep.num_compilations} training programs (one per optimizer for "
        f"all schedules, rates and seeds); {compilations.total} in total, with small ones of the set-up."
    )
    publish(
        job,
        f"GreedyLR and common schedules: {task_name}",
        f"{title}.",
        tables={"table": table},
        figures={"table": report.draw_table(table, title), "histories": report.draw_histories(runs, title)},
        sections=[html.Section("Result", conclusion, []), *report.sections(runs, table)],
        recomputed_by="experiments.reporting.summary.summarize",
        schedules=SCHEDULES,
    )


class _CompilationCount:
    """Counts the programs that XLA compiles in this process, by JAX's monitoring."""

    def __init__(self):
        self.total = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        del duration, details
        self.total += event == _COMPILE_EVENT

    def stop(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
