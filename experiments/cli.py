"""The command line: ``python -m experiments COMMAND``."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from experiments.arc import commands as arc_commands
from experiments.errors import UsageError
from experiments.options import at_least, make_console, names, one_of, rates

BENCHMARKS = ("arc", "overhead", "probing", "published", "sweep")
MIN_STEPS = 20  # the first stage of the table is 10% of the steps, and its loss a mean over 5%


class _Interruptible(typer.core.TyperGroup):
    """Says how an interrupted command goes on, as Typer ends at an interrupt without a word."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Interruptible,
    help="Honest tests of learning-rate rules: same seeds, same batches, several initial rates.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(arc_commands.app, name="arc")


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
    from experiments.studies.compare import compare as run
    from experiments.training import engine  # imports JAX, which the help does without

    optimizers = names("--optimizer", optimizer, engine.OPTIMIZERS)
    at_least("--steps", steps, MIN_STEPS)
    at_least("--seeds", seeds, 1)
    initial_rates = None if learning_rates is None else rates("--learning-rates", learning_rates)
    engine.configure()
    run(
        task,
        optimizers,
        steps=steps,
        seeds=seeds,
        learning_rates=initial_rates,
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
    one_of("NAME", name, STUDIES)
    one_of("--preset", preset, ("quick", "full"))
    from experiments.studies.base import Job
    from experiments.training import engine

    engine.configure()
    STUDIES[name].load()(Job(name, preset, out or Path("results") / name, make_console(), cluster, fresh))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"Which benchmark: {', '.join(BENCHMARKS)}.")],
    repeats: Annotated[int, typer.Option(help="Turns of each side in a timing.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/bench"),
) -> None:
    """Measure costs; all sides take turns in one run, and ratios are compared."""
    one_of("NAME", name, BENCHMARKS)
    at_least("--repeats", repeats, 1)
    from experiments.training import engine

    engine.configure()
    module = importlib.import_module(f"experiments.bench.{name}")
    module.run(make_console(), out, repeats)


def main() -> None:
    """Runs the command line; what a user can mend ends in one line and exit status 2."""
    try:
        app()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
