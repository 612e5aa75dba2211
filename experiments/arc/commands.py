"""The commands ``python -m experiments arc ...``: from trainings to weights, and what they are worth."""

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
    help="Makes and judges the weights of ARC's network: generate, train, select, evaluate, or all of them.",
    no_args_is_help=True,
)


class Sizes(NamedTuple):
    """How much work a preset is."""

    configurations: int
    trainings: int
    candidates: int
    epochs: int
    learning_rate: float
    proxy_steps: int
    steps: dict[str, int]  # of each case of arc evaluate; multiples of 30
    seeds: int  # of the proxy task and of the evaluation


PRESETS: dict[str, Sizes] = {
    # A pass through everything, as in the tests; its weights are worth nothing.
    "tiny": Sizes(3, 18, 2, 2, 1e-3, 60, {"image": 60}, 2),
    "quick": Sizes(12, 120, 4, 40, 1e-3, 300, {"image": 600}, 3),
    "full": Sizes(12, 640, 10, 300, 3e-4, 600, {"image": 3000, "detection": 900, "language": 900}, 5),
}
Preset = Annotated[str, typer.Option(help=f"How much work: {', '.join(PRESETS)}.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Drop unfinished work instead of going on with it.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results. Default: below results/arc.")]
Published = Annotated[
    Path | None, typer.Option(help="The authors' weights as a safetensors file, to run beside ours.")
]


@app.command()
def generate(
    preset: Preset = "quick",
    trainings: Annotated[
        int | None, typer.Option(help="About how many trainings; each gives up to ten samples.")
    ] = None,
    out: Out = None,
    fresh: Fresh = False,
) -> None:
    """Train networks whose checkpoints branch, and keep what the loss looked like and what did best."""
    sizes, console = _begin(preset)
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
    preset: Preset = "quick",
    candidates: Annotated[int | None, typer.Option(help="Networks that differ in their start.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    samples: Annotated[Path, typer.Option(help="What arc generate left.")] = ROOT / "samples/runs.parquet",
    out: Out = None,
    fresh: Fresh = False,
) -> None:
    """Train candidates of ARC's network on the samples."""
    sizes, console = _begin(preset)
    for option, value in (("--candidates", candidates), ("--epochs", epochs)):
        if value is not None:
            at_least(option, value, 1)
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise UsageError(f"--learning-rate must be positive, got {learning_rate}")
    from experiments.arc.training import Settings
    from experiments.arc.training import train as run

    settings = Settings(
        candidates or sizes.candidates, epochs or sizes.epochs, learning_rate or sizes.learning_rate
    )
    run(samples, out or ROOT / "candidates", settings, console, fresh=fresh)


@app.command()
def select(
    preset: Preset = "quick",
    candidates: Annotated[Path, typer.Option(help="What arc train left.")] = ROOT / "candidates",
    out: Out = None,
    fresh: Fresh = False,
) -> None:
    """Choose the candidate that trains a proxy task best."""
    sizes, console = _begin(preset)
    from experiments.arc import select as module
    from experiments.studies.base import Job

    job = Job("select", preset, out or ROOT / "selection", console, fresh=fresh, command="arc")
    module.select(candidates, job, module.Sizes(sizes.proxy_steps, sizes.seeds))


@app.command()
def evaluate(
    preset: Preset = "quick",
    weights: Annotated[
        Path | None, typer.Option(help="Weights as a safetensors file. Default: those of the package.")
    ] = None,
    published: Published = None,
    out: Out = None,
    fresh: Fresh = False,
) -> None:
    """Compare ARC with other schedules at three initial rates."""
    sizes, console = _begin(preset)
    for option, path in (("--weights", weights), ("--published", published)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} must be a file, got {path}")
    from experiments.arc import evaluate as module
    from experiments.studies.base import Job

    job = Job("evaluate", preset, out or ROOT / "evaluation", console, fresh=fresh, command="arc")
    module.evaluate(job, module.Sizes(sizes.steps, sizes.seeds), weights, published)


@app.command(name="all")
def everything(
    preset: Preset = "quick", published: Published = None, out: Out = None, fresh: Fresh = False
) -> None:
    """Generate, train, select and evaluate, one after the other; goes on with what was interrupted."""
    folder = out or ROOT
    samples, candidates = folder / "samples", folder / "candidates"
    selection, evaluation = folder / "selection", folder / "evaluation"
    weights = selection / "arc.safetensors"
    # What each stage leaves at its end, and the stage.
    stages: tuple[tuple[Path, Callable[[], Any]], ...] = (
        (samples / "runs.parquet", lambda: generate(preset, None, samples, fresh)),
        (
            candidates / "histories.parquet",
            lambda: train(preset, None, None, None, samples / "runs.parquet", candidates, fresh),
        ),
        (weights, lambda: select(preset, candidates, selection, fresh)),
        (evaluation / "report.html", lambda: evaluate(preset, weights, published, evaluation, fresh)),
    )
    _claim(folder, preset, [result for result, _ in stages], fresh=fresh)
    for result, run in stages:
        if not result.exists():
            run()


def _claim(folder: Path, preset: str, results: list[Path], *, fresh: bool) -> None:
    """Notes the preset in the folder; what another one left there is no result of this one."""
    from experiments.training.store import write_atomically

    note, described = folder / "all.json", json.dumps({"preset": preset})
    is_ours = note.exists() and note.read_text(errors="replace") == described
    if fresh:
        for result in results:
            result.unlink(missing_ok=True)
    elif not is_ours and any(result.exists() for result in results):
        raise UsageError(
            f"{folder} holds results that arc all --preset {preset} did not make: give --fresh to make them "
            "all anew, or another --out"
        )
    write_atomically(note, lambda path: path.write_text(described))


def _begin(preset: str) -> tuple[Sizes, Console]:
    one_of("--preset", preset, PRESETS)
    from experiments.training import engine

    engine.configure()
    return PRESETS[preset], make_console()
