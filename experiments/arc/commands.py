"""The commands ``python -m experiments arc generate|train|select|evaluate|all``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from experiments.errors import UsageError
from experiments.options import at_least, make_console, one_of

ROOT = Path("results/arc")
app = typer.Typer(
    help="Train and evaluate the weights of ARC's network: generate, train, select, evaluate, or all.",
    no_args_is_help=True,
)


class Preset(NamedTuple):
    """Amount of work of each stage."""

    configurations: int  # tasks that samples are generated from
    trainings: int  # training runs that samples are generated from
    candidates: int  # networks trained on the samples
    epochs: int  # passes over the samples
    learning_rate: float  # of Adam, for the candidates
    proxy_steps: int  # training steps of arc select
    steps: dict[str, int]  # training steps of each case of arc evaluate; multiples of 30
    seeds: int  # of arc select and arc evaluate
    intervals: tuple[int, ...]  # epochs between two decisions in arc evaluate


PRESETS: dict[str, Preset] = {
    # Runs every stage, for tests; the resulting weights are useless.
    "tiny": Preset(3, 18, 2, 2, 1e-3, 60, {"image": 60}, 2, (1, 3)),
    "quick": Preset(
        12, 120, 4, 40, 1e-3, 300, {"image": 600, "detection": 300, "language": 300}, 3, (1, 3, 6)
    ),
    "full": Preset(
        12,
        640,
        10,
        300,
        3e-4,
        600,
        {"image": 3000, "detection": 900, "language": 900},
        5,
        (1, 2, 3, 4, 5, 6),
    ),
}
PresetOption = Annotated[str, typer.Option(help=f"Amount of work: {', '.join(PRESETS)}.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Discard unfinished work instead of resuming it.")]
OutOption = Annotated[Path | None, typer.Option(help="Output folder. Default: below results/arc.")]
PublishedOption = Annotated[
    Path | None, typer.Option(help="The authors' weights as a safetensors file, to include them.")
]


@app.command()
def generate(
    preset: PresetOption = "quick",
    trainings: Annotated[
        int | None, typer.Option(help="Approximate number of training runs; each yields up to ten samples.")
    ] = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> None:
    """Generate samples: loss histories labelled with the best change of the learning rate."""
    sizes, console = _set_up(preset)
    if trainings is not None:
        at_least("--trainings", trainings, 1)
    from experiments.arc.generate import generate as run

    run(
        out or ROOT / "samples",
        trainings or sizes.trainings,
        console,
        configurations=sizes.configurations,
        fresh=fresh,
    )


@app.command()
def train(
    preset: PresetOption = "quick",
    candidates: Annotated[
        int | None, typer.Option(help="Number of networks, each with its own initial weights.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of Adam.")] = None,
    samples: Annotated[Path, typer.Option(help="Samples from arc generate.")] = ROOT / "samples/runs.parquet",
    out: OutOption = None,
    fresh: FreshOption = False,
    architecture: Annotated[
        str,
        typer.Option(help="small (9,315 parameters, as in the package) or published (79,043, the paper's)."),
    ] = "small",
) -> None:
    """Train candidates of ARC's network on the samples."""
    one_of("--architecture", architecture, ("small", "published"))
    sizes, console = _set_up(preset)
    for option, value in (("--candidates", candidates), ("--epochs", epochs)):
        if value is not None:
            at_least(option, value, 1)
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise UsageError(f"--learning-rate must be positive, got {learning_rate}")
    from experiments.arc.training import CandidateSettings
    from experiments.arc.training import train as run

    settings = CandidateSettings(
        candidates or sizes.candidates,
        epochs or sizes.epochs,
        learning_rate or sizes.learning_rate,
        architecture,
    )
    run(samples, out or ROOT / "candidates", settings, console, fresh=fresh)


@app.command()
def select(
    preset: PresetOption = "quick",
    candidates: Annotated[Path, typer.Option(help="Folder with candidates from arc train.")] = ROOT
    / "candidates",
    out: OutOption = None,
    fresh: FreshOption = False,
) -> None:
    """Select the candidate with the best accuracy on a proxy task."""
    sizes, console = _set_up(preset)
    from experiments.arc import select as module
    from experiments.studies.base import Job

    job = Job("select", preset, out or ROOT / "selection", console, fresh=fresh, command="arc")
    module.select(candidates, job, module.SelectionSettings(sizes.proxy_steps, sizes.seeds))


@app.command()
def evaluate(
    preset: PresetOption = "quick",
    weights: Annotated[
        Path | None, typer.Option(help="Weights as a safetensors file. Default: those of the package.")
    ] = None,
    published: PublishedOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> None:
    """Compare ARC with other schedules at three initial learning rates."""
    sizes, console = _set_up(preset)
    for option, path in (("--weights", weights), ("--published", published)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} must be a file, got {path}")
    from experiments.arc import evaluate as module
    from experiments.studies.base import Job

    job = Job("evaluate", preset, out or ROOT / "evaluation", console, fresh=fresh, command="arc")
    module.evaluate(
        job, module.EvaluationSettings(sizes.steps, sizes.seeds, sizes.intervals), weights, published
    )


@app.command(name="all")
def everything(
    preset: PresetOption = "quick",
    published: PublishedOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> None:
    """Generate, train, select and evaluate in sequence; resumes after an interruption."""
    folder = out or ROOT
    samples, candidates = folder / "samples", folder / "candidates"
    selection, evaluation = folder / "selection", folder / "evaluation"
    weights = selection / "arc.safetensors"
    # Each stage with the file that it writes last.
    stages: tuple[tuple[Path, Callable[[], Any]], ...] = (
        (samples / "runs.parquet", lambda: generate(preset, None, samples, fresh)),
        (
            candidates / "histories.parquet",
            lambda: train(preset, None, None, None, samples / "runs.parquet", candidates, fresh),
        ),
        (weights, lambda: select(preset, candidates, selection, fresh)),
        (evaluation / "report.html", lambda: evaluate(preset, weights, published, evaluation, fresh)),
    )
    _reserve(folder, preset, [result for result, _ in stages], fresh=fresh)
    for result, run in stages:
        if not result.exists():
            run()


def _reserve(folder: Path, preset: str, results: list[Path], *, fresh: bool) -> None:
    """Records the preset in ``all.json``; raises ``UsageError`` if results of another preset are there."""
    from experiments.training.store import write_atomically

    record, content = folder / "all.json", json.dumps({"preset": preset})
    has_same_preset = record.exists() and record.read_text(errors="replace") == content
    if fresh:
        for result in results:
            result.unlink(missing_ok=True)
    elif not has_same_preset and any(result.exists() for result in results):
        raise UsageError(
            f"{folder} holds results of another call than arc all --preset {preset}; pass --fresh to replace "
            "them, or another --out"
        )
    write_atomically(record, lambda path: path.write_text(content))


def _set_up(preset: str) -> tuple[Preset, Console]:
    """Validates the preset, configures JAX, and returns the preset's sizes and a console."""
    one_of("--preset", preset, PRESETS)
    from experiments.training import engine

    engine.configure()
    return PRESETS[preset], make_console()
