"""The command line: ``python -m experiments COMMAND``."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from experiments import welcome
from experiments.arc import commands as arc_commands
from experiments.errors import UsageError
from experiments.options import at_least, make_console, names, one_of, rates

BENCHMARKS = ("accelerators", "arc", "overhead", "probing", "published", "sweep")
MIN_STEPS = 20  # the table shows the loss at 10% of the steps, a mean over 5% of them


class _Interruptible(typer.core.TyperGroup):
    """Prints how to resume after an interrupt, at which Typer exits silently."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("Interrupted. Run the same command again to resume.", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Interruptible,
    help="Experiments with learning-rate rules: same seeds, same batches, several initial rates.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def overview(context: typer.Context) -> None:
    """Experiments with learning-rate rules: same seeds, same batches, several initial rates."""
    if context.invoked_subcommand is None:
        typer.echo(welcome.OVERVIEW, nl=False)


app.add_typer(arc_commands.app, name="arc")


@app.command()
def compare(
    task: Annotated[str, typer.Option(help="Task to train; the command tasks lists them.")] = "digits",
    optimizer: Annotated[
        str,
        typer.Option(
            help="One or more of adamw,sgd,momentum,momentum-decay,adam,adagrad,adafactor,lion,muon, "
            "separated by commas."
        ),
    ] = "adamw,sgd",
    steps: Annotated[int, typer.Option(help=f"Training steps per run, at least {MIN_STEPS}.")] = 600,
    seeds: Annotated[int, typer.Option(help="Number of seeds of parameters and batches.")] = 5,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Initial rates for every optimizer, separated by commas. Default: three of the task's."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("results/compare"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard an unfinished comparison instead of resuming it.")
    ] = False,
) -> None:
    """Compare GreedyLR with common schedules on real data: constant, linear, cosine, exponential, plateau."""
    from experiments.studies.base import Job
    from experiments.studies.compare import Comparison
    from experiments.studies.compare import compare as run
    from experiments.training import engine  # imports JAX, which the help does not need

    optimizers = names("--optimizer", optimizer, engine.OPTIMIZERS)
    at_least("--steps", steps, MIN_STEPS)
    at_least("--seeds", seeds, 1)
    initial_rates = None if learning_rates is None else rates("--learning-rates", learning_rates)
    console = make_console()
    welcome.explain_first_run(console)
    engine.configure()
    arguments = f"--task {task} --optimizer {','.join(optimizers)} --steps {steps} --seeds {seeds}"
    if initial_rates is not None:
        arguments += f" --learning-rates {','.join(f'{rate:g}' for rate in initial_rates)}"
    job = Job("compare", "", out, console, fresh=fresh, command="compare", arguments=arguments)
    run(job, Comparison(task, optimizers, steps, seeds, initial_rates))


@app.command()
def tasks() -> None:
    """List the tasks."""
    from experiments.tasks import TASKS

    for name, entry in TASKS.items():
        typer.echo(f"{name}: {entry.summary}")


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="Study to run; --list shows them.")] = None,
    preset: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    task: Annotated[
        str | None,
        typer.Option(
            help="One or more tasks instead of the study's, separated by commas; see the command tasks. "
            "initial-rate: entries of its suite (names: experiments/tasks/suite.py)."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="One or more optimizers instead of the study's, separated by commas."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: results/NAME.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="Train on a Ray cluster: auto (the cluster of this machine) or an address."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard an unfinished study instead of resuming it.")
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="initial-rate: development or held-out, a half of the suite.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="initial-rate: rules, separated by commas.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="initial-rate: numbers of steps, separated by commas.")
    ] = None,
) -> None:
    """Run a study: experiments of the papers, or comparisons of all rules."""
    from experiments.studies import STUDIES, check_options

    if show_list or name is None:
        for key, each in STUDIES.items():
            typer.echo(f"{key}: {each.summary}")
        return
    one_of("NAME", name, STUDIES)
    one_of("--preset", preset, ("quick", "full"))
    from experiments.studies.base import Job, Selection
    from experiments.training import engine

    selection = Selection(task, optimizer, split, rule, steps)
    check_options(name, selection)
    console = make_console()
    welcome.explain_first_run(console)
    engine.configure()
    out = out or Path("results") / name
    job = Job(name, preset, out, console, cluster, fresh, selection=selection)
    STUDIES[name].load()(job)


@app.command()
def pretrain(
    preset: Annotated[str, typer.Option(help="quick (minutes) or full (hours).")] = "quick",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the networks of the preset anew.")] = False,
) -> None:
    """Train the networks that fine-tuning starts from, and store them in the user's cache folder."""
    one_of("--preset", preset, ("quick", "full"))
    from experiments import pretraining
    from experiments.training import engine

    console = make_console()
    welcome.explain_first_run(console)
    engine.configure()
    pretraining.pretrain(preset, console, fresh=fresh)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"Benchmark to run: {', '.join(BENCHMARKS)}.")],
    repeats: Annotated[int, typer.Option(help="Repetitions of each timed variant; sweep has one.")] = 15,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("results/bench"),
) -> None:
    """Run a benchmark: times variants in random order; accelerators compiles for TPU and GPU, and counts."""
    one_of("NAME", name, BENCHMARKS)
    at_least("--repeats", repeats, 1)
    from experiments.training import engine

    engine.configure()
    module = importlib.import_module(f"experiments.bench.{name}")
    module.run(make_console(), out, repeats)


def main() -> None:
    """Runs the command line; a ``UsageError`` is printed as one line, with exit status 2."""
    try:
        app()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
