"""The command line: ``python -m experiments COMMAND``."""

import importlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from experiments.errors import UsageError

MIN_STEPS = 20  # the first stage of the table is 10% of the steps, and its loss a mean over 5%
app = typer.Typer(
    help="Honest tests of learning-rate rules: same seeds, same batches, several initial rates.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def compare(
    task: Annotated[str, typer.Option(help="What to train; the command tasks lists them.")] = "digits",
    optimizer: Annotated[
        str, typer.Option(help="One or more of adamw,sgd,momentum,adagrad,adafactor, with commas.")
    ] = "adamw,sgd",
    steps: Annotated[int, typer.Option(help=f"Training steps of a run, at least {MIN_STEPS}.")] = 600,
    seeds: Annotated[int, typer.Option(help="Runs that differ in parameters and batches.")] = 5,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Initial rates with commas, for every optimizer. Default: three of the task's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/compare"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop an unfinished comparison instead of going on with it.")
    ] = False,
) -> None:
    """Compare GreedyLR with constant, linear, cosine and reduce-on-plateau schedules on real data."""
    from experiments import engine  # imports JAX, which the help does without
    from experiments.compare import compare as run

    optimizers = _names("--optimizer", optimizer, engine.OPTIMIZERS)
    _at_least("--steps", steps, MIN_STEPS)
    _at_least("--seeds", seeds, 1)
    rates = None if learning_rates is None else _rates("--learning-rates", learning_rates)
    engine.configure()
    run(
        task,
        optimizers,
        steps=steps,
        seeds=seeds,
        learning_rates=rates,
        out=out,
        fresh=fresh,
    )


@app.command()
def tasks() -> None:
    """List the tasks: what a comparison can train."""
    from experiments.tasks import TASKS

    for name, entry in TASKS.items():
        typer.echo(f"{name}: {entry.summary}")


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="Which study; --list shows them.")] = None,
    preset: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: results/NAME.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="Train on a Ray cluster: auto (the one of this machine) or an address."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop an unfinished study instead of going on with it.")
    ] = False,
) -> None:
    """Put the claims of a paper to the test."""
    from experiments.studies import STUDIES

    if show_list or name is None:
        for key, each in STUDIES.items():
            typer.echo(f"{key}: {each.summary}")
        return
    _one_of("NAME", name, STUDIES)
    _one_of("--preset", preset, ("quick", "full"))
    from experiments import engine
    from experiments.studies.base import Job

    engine.configure()
    STUDIES[name].load()(Job(name, preset, out or Path("results") / name, _console(), cluster, fresh))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark: probing or sweep.")],
    repeats: Annotated[int, typer.Option(help="Turns of each side in a timing.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/bench"),
) -> None:
    """Measure costs; all sides take turns in one run, and ratios are compared."""
    _one_of("NAME", name, ("probing", "sweep"))
    _at_least("--repeats", repeats, 1)
    from experiments import engine

    engine.configure()
    module = importlib.import_module(f"experiments.bench.{name}")
    module.run(_console(), out, repeats)


def _console() -> Console:
    """A file or a pipe has no width, and tables need some."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)


def _one_of(option: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(option: str, value: int, low: int) -> None:
    if value < low:
        raise UsageError(f"{option} must be at least {low}, got {value}")


def _names(option: str, text: str, allowed: object) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} must be of {', '.join(allowed)}, with commas, got {name!r}")
    if len(set(names)) < len(names):
        raise UsageError(f"{option} names one twice: {text!r}")
    return names


def _rates(option: str, text: str) -> list[float]:
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise UsageError(f"{option} must be positive numbers with commas, got {part.strip()!r}")
        rates.append(rate)
    if len(set(rates)) < len(rates):
        raise UsageError(f"{option} names one twice: {text!r}")
    return rates


def main() -> None:
    """Runs the command line; what a user can mend ends in one line and exit status 2."""
    try:
        app()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
