"""The time of many runs with the engine, compared with a compilation for each schedule and rate."""

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console

from experiments.reporting.tables import print_table
from experiments.tasks import make_task
from experiments.tasks.base import Task
from experiments.training.engine import OPTIMIZERS, Engine, RunSpec, Settings, make_specs
from experiments.training.loop import train
from experiments.training.schedules import AdaptiveScale, PassiveSchedule, parse
from experiments.training.store import write_atomically

TASKS, OPTIMIZER_NAMES = ("digits-mlp", "mnist1d-mlp"), ("adamw", "sgd", "adagrad")
SCHEDULES = ("constant", "linear", "cosine", "knee", "plateau", "GreedyLR")
STEPS, SEEDS = 1000, 5


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Trains 540 runs with the engine and a sixth of them naively; prints times, writes ``sweep.json``."""
    del repeats  # a repetition takes a minute
    tasks = [make_task(name) for name in TASKS]
    seconds, runs = 0.0, 0
    first = None
    for task in tasks:
        for optimizer in OPTIMIZER_NAMES:
            specs = make_specs(SCHEDULES, task.learning_rates[optimizer], range(SEEDS))
            start = time.perf_counter()
            results = [
                each for group in Engine(task, optimizer, Settings(STEPS)).train(specs) for each in group
            ]
            elapsed = time.perf_counter() - start
            seconds, runs = seconds + elapsed, runs + len(results)
            first = first or (task, optimizer, specs, elapsed)
    task, optimizer, specs, elapsed = first
    start = time.perf_counter()
    _train_naively(task, optimizer, specs)
    naive = time.perf_counter() - start

    rows = [
        ("engine, all", runs, seconds),
        (f"engine, {task.name}, {optimizer}", len(specs), elapsed),
        ("the same, a compilation for each schedule and rate", len(specs), naive),
    ]
    cells = [(name, str(count), f"{each:.1f}", f"{count / each:.1f}") for name, count, each in rows]
    title = f"{STEPS} steps each, on {jax.devices()[0].device_kind}"
    print_table(console, title, ("variant", "runs", "seconds", "runs per second"), cells)
    console.print(f"The engine takes {elapsed / naive:.2f} of the naive time on the same runs.")
    result = {"device": jax.devices()[0].device_kind, "rows": rows, "ratio": elapsed / naive}
    write_atomically(out / "sweep.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result


def _train_naively(task: Task, optimizer: str, specs: list[RunSpec]) -> None:
    """A straightforward version: one jitted function per schedule and rate, called for each seed."""
    cells = dict.fromkeys((spec.schedule, spec.learning_rate) for spec in specs)
    for schedule, rate in cells:
        run = jax.jit(functools.partial(_train, task, _optimizer(task, optimizer, schedule, rate)))
        for spec in specs:
            if (spec.schedule, spec.learning_rate) == (schedule, rate):
                jax.block_until_ready(run(spec.seed))


def _optimizer(task: Task, optimizer: str, schedule: str, rate: float) -> optax.GradientTransformation:
    """The optimizer with a passive schedule, or followed by an adaptive scale."""
    entry, settings = parse(schedule)
    if isinstance(entry, PassiveSchedule):
        fraction = entry.fractions(STEPS)
        return OPTIMIZERS[optimizer](lambda step: rate * fraction(step))
    assert isinstance(entry, AdaptiveScale)
    scale = entry.transform(task.steps_per_epoch, {**entry.traced, **settings})
    return optax.chain(OPTIMIZERS[optimizer](rate), scale)


def _train(task: Task, tx: optax.GradientTransformation, seed: jax.Array) -> Any:
    params, losses, _ = train(task, tx, STEPS, seed)
    return losses, task.metric(params, task.test)
