"""What the command line says first: an overview, the cache folders, and how long a comparison will take."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

OVERVIEW = """\
Experiments with learning-rate rules: same seeds, same batches, several initial rates.

Try first (about a minute on two cores), and open results/compare/report.html:

  python -m experiments compare

Then:

  python -m experiments compare --task mnist1d-mlp    the same on another task
  python -m experiments tasks                         the tasks
  python -m experiments study leaderboard             all rules and strong baselines (13 minutes)
  python -m experiments study                         the studies: experiments of the papers, and more
  python -m experiments bench overhead                what each rule adds to a training step
  python -m experiments arc all --preset tiny         train the controller ARC (2 minutes)

Each command explains its options with --help. Results go to results/; an interrupted command resumes when
it is run again.
"""


def cache_folder() -> Path:
    """Where compiled programs are stored: ``JAX_COMPILATION_CACHE_DIR``, or the user's cache folder."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "greedylr_jax" / "xla"


def data_folder() -> Path:
    """Where TFDS prepares data sets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def explain_first_run(console: Console) -> None:
    """Says where data and compiled programs are stored, if one of the folders does not exist yet."""
    programs, data = cache_folder(), data_folder()
    if programs.exists() and data.exists():
        return
    console.print(
        f"First run: data sets are prepared in {data}, and compiled programs are stored in {programs}, so "
        "that later runs start faster. Both folders may be deleted at any time; TFDS_DATA_DIR and "
        "JAX_COMPILATION_CACHE_DIR choose others.",
        soft_wrap=True,
    )


# For CPUs: `compare` takes about a minute on two cores, in which it trains 150 runs of 600 steps of 10 MFLOP.
_START_UP = 5.0  # seconds, per optimizer: reading data and compiling, with the compiled program in the cache
_COMPILE = 15.0  # seconds, per optimizer, without it
_OVERHEAD = 1e-4  # seconds per step
_SPEED = 8e9  # floating-point operations per second and core


def estimate_seconds(
    flops: Sequence[float], runs: int, steps: int, devices: int, *, is_cached: bool
) -> float:
    """A rough duration of a comparison.

    Args:
      flops: floating-point operations of a training step, for each optimizer.
      runs: per optimizer.
      steps: of a run.
      devices: number of runs that are trained at once.
      is_cached: whether compiled programs are in the cache.

    Examples:
      >>> estimate_seconds([8e6], runs=20, steps=1000, devices=2, is_cached=True)
      16.0
    """
    rounds = -(-runs // devices)
    training = sum(rounds * steps * (_OVERHEAD + each / _SPEED) for each in flops)
    return training + len(flops) * (_START_UP if is_cached else _COMPILE)


def duration_text(seconds: float) -> str:
    """A duration to one significant step, for a sentence.

    Examples:
      >>> duration_text(3), duration_text(47), duration_text(100)
      ('about 10 seconds', 'about 50 seconds', 'about 2 minutes')
      >>> duration_text(5000), duration_text(20000)
      ('about 80 minutes', 'about 6 hours')
    """
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} seconds"
    minutes = seconds / 60
    if minutes < 120:
        return f"about {round(minutes) if minutes < 20 else 10 * round(minutes / 10)} minutes"
    return f"about {round(minutes / 60)} hours"
