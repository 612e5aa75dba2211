"""Generates training samples for ARC: loss histories labelled with the change of rate that worked best.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Sections 3.2 and
3.3. A training run has ten rounds. Each round trains the network for n epochs; from that checkpoint, three
branches train for n more epochs with the rate raised, unchanged and lowered; the label is the branch with the
lowest validation loss. The branch with the highest loss is then discarded, one of the other two is drawn, and
the next round continues from the checkpoint with its rate. Because that repeats a branch with different
batches, it shows how reliable the comparison is: if the repeated loss changes the order of the three, the
label becomes "keep".
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from rich.console import Console

import greedylr_jax
from experiments.arc.configurations import CONFIGURATIONS, OPTIMIZERS, RATES, Configuration
from experiments.progress import make_progress
from experiments.tasks.base import Batch, Task
from experiments.training.engine import compiler_options, device_mesh, place, side_by_side
from experiments.training.loop import take, train_step
from experiments.training.store import RunStore
from greedylr_jax.arc import ACTIONS
from greedylr_jax.arc._controller import MULTIPLIERS
from greedylr_jax.arc._features import MAX_CYCLES

ROUNDS = 10
MAX_EPOCHS = 10  # per round
EPOCH_STEPS = 20  # steps that count as an epoch; the number of batches varies too much between these tasks
_KEEP = ACTIONS.index("keep")
_PARTS = 1 + len(ACTIONS)  # per round: the training itself, then one branch per action


class Training(NamedTuple):
    """A training run from which samples are generated."""

    seed: int
    learning_rate: float
    epochs: int  # per round


# A configuration, the name of an optimizer, and training runs.
Planned = tuple[Configuration, str, list[Training]]


class Rounds(NamedTuple):
    """The record of a training run: one row per round, and one more to check the label of the last round."""

    train_loss: np.ndarray  # shape=(rounds + 1, MAX_EPOCHS * EPOCH_STEPS); NaN beyond the round
    validation_loss: np.ndarray  # shape=(rounds + 1, MAX_EPOCHS); NaN beyond the round
    rate: np.ndarray  # shape=(rounds + 1,)
    branch_loss: np.ndarray  # shape=(rounds, 3); final validation loss of each branch
    drawn: np.ndarray  # shape=(rounds,); the branch that the next round repeats


def correct_label(branch_loss: np.ndarray, drawn: int, repeated: float) -> int:
    """Returns the corrected label of a round.

    Args:
      branch_loss: validation losses after raising, keeping and lowering the rate, shape (3,); infinite if
        the branch diverged.
      drawn: index of the branch that was repeated.
      repeated: validation loss of the repeated branch.

    Returns:
      The index of the lowest loss, or that of "keep" if the repeated loss changes the order of the three.

    Examples:
      >>> correct_label(np.array([0.113, 0.112, 0.111]), 2, 0.109)
      2
      >>> correct_label(np.array([0.113, 0.112, 0.111]), 2, 0.115)
      1

    Source: Section 3.3.
    """
    again = branch_loss.copy()
    again[drawn] = repeated
    same_order = np.array_equal(np.argsort(branch_loss, kind="stable"), np.argsort(again, kind="stable"))
    return int(np.argmin(branch_loss)) if same_order else _KEEP


def train_rounds(
    task: Task,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    data: tuple[Batch, Batch],
    training: Training,
) -> Rounds:
    """Runs all rounds and branches of one training run.

    They are iterations of a single ``lax.scan``, so that the training step is compiled once.

    Args:
      task: the task to train.
      make_optimizer: from a learning rate to an optimizer.
      data: training and validation examples; may be traced.
      training: the run; may be traced.
    """
    multipliers = jnp.asarray((1.0, *MULTIPLIERS), jnp.float32)  # of each part of a round
    init_key, run_key = jax.random.split(jax.random.key(training.seed))
    train_part = _make_train_part(task, make_optimizer, data, training.epochs)

    def one_part(carry: Any, inputs: Any) -> Any:
        checkpoint, rate, ends, drawn = carry
        part, key = inputs
        end, losses, validation = train_part(checkpoint, rate * multipliers[part], key)
        checkpoint = jax.tree.map(lambda new, old: jnp.where(part == 0, new, old), end, checkpoint)
        last_loss = validation[training.epochs - 1]
        last_loss = jnp.where(jnp.isfinite(last_loss), last_loss, jnp.inf)
        ends = jnp.where(jnp.arange(_PARTS) == part, last_loss, ends)
        # Draw one of the two branches other than the worst; of equal losses, the first counts as the worst.
        others = (jnp.argmax(ends[1:]) + jnp.array([1, 2])) % len(ACTIONS)
        is_last = part == _PARTS - 1
        drawn = jnp.where(is_last, others[jax.random.randint(key, (), 0, 2)], drawn)
        next_rate = jnp.where(is_last, rate * multipliers[1 + drawn], rate)
        return (checkpoint, next_rate, ends, drawn), (losses, validation, rate, ends[1:], drawn)

    params = task.init(init_key)
    rate = jnp.asarray(training.learning_rate, jnp.float32)
    start = (params, make_optimizer(rate).init(params)), rate, jnp.zeros(_PARTS), jnp.zeros((), jnp.int32)
    count = ROUNDS * _PARTS + 1
    inputs = jnp.arange(count) % _PARTS, jax.random.split(run_key, count)
    _, (losses, validation, rates, ends, drawn) = jax.lax.scan(one_part, start, inputs)
    first, last = slice(0, None, _PARTS), slice(_PARTS - 1, None, _PARTS)
    return Rounds(losses[first], validation[first], rates[first], ends[last], drawn[last])


def _make_train_part(
    task: Task,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    data: tuple[Batch, Batch],
    epochs: jax.Array | int,
) -> Callable[..., tuple[Any, jax.Array, jax.Array]]:
    """Returns a function that trains for a round's epochs from ``(params, optimizer state)``.

    Batches are drawn with replacement, because an epoch is a number of steps here.

    Returns:
      From the start, the learning rate and a key to the end, the training losses, shape
      (MAX_EPOCHS * EPOCH_STEPS,), and the validation losses, shape (MAX_EPOCHS,), both padded with NaN.
    """
    train, test = data

    def train_part(start: tuple[Any, Any], rate: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        tx = optax.with_extra_args_support(make_optimizer(rate))

        def step(index: jax.Array, carry: Any) -> Any:
            params, state, losses, validation = carry
            drawn = jax.random.randint(
                jax.random.fold_in(key, index), (task.batch_size,), 0, task.num_examples
            )
            params, state, loss = train_step(task, tx, params, state, take(train, drawn))
            epoch = index // EPOCH_STEPS
            validation_loss = jax.lax.cond(
                (index + 1) % EPOCH_STEPS == 0, lambda: task.loss(params, test), lambda: validation[epoch]
            )
            return params, state, losses.at[index].set(loss), validation.at[epoch].set(validation_loss)

        padding = jnp.full(MAX_EPOCHS * EPOCH_STEPS, jnp.nan), jnp.full(MAX_EPOCHS, jnp.nan)
        *end, losses, validation = jax.lax.fori_loop(0, epochs * EPOCH_STEPS, step, (*start, *padding))
        return tuple(end), losses, validation

    return train_part


def samples_of(training: Training, rounds: Rounds) -> Iterator[dict[str, Any]]:
    """Yields the samples of a training run: histories of up to three rounds, and the corrected label.

    Stops at the first round that has a non-finite loss.
    """
    steps = training.epochs * EPOCH_STEPS
    for index in range(ROUNDS):
        window = slice(max(0, index + 1 - MAX_CYCLES), index + 1)
        train, validation = (
            rounds.train_loss[window, :steps],
            rounds.validation_loss[window, : training.epochs],
        )
        if not (np.isfinite(train).all() and np.isfinite(validation).all()):
            return
        repeated = float(rounds.validation_loss[index + 1, training.epochs - 1])
        repeated = repeated if np.isfinite(repeated) else np.inf
        ends = rounds.branch_loss[index].astype(float)
        yield {
            "round": index,
            "train_loss": train.tolist(),
            "validation_loss": validation.tolist(),
            "rates": rounds.rate[window].tolist(),
            "branch_loss": ends.tolist(),
            "drawn": int(rounds.drawn[index]),
            "repeated": repeated,
            "uncorrected": int(np.argmin(ends)),
            "label": correct_label(ends, int(rounds.drawn[index]), repeated),
        }


def plan(trainings: int, configurations: int = len(CONFIGURATIONS)) -> Iterator[Planned]:
    """Yields the training runs of each configuration and optimizer, with random rates and numbers of epochs.

    Args:
      trainings: approximate total number, divided by the configurations' shares; at least one per
        configuration and optimizer.
      configurations: number of configurations to use, from the start of :data:`CONFIGURATIONS`.
    """
    chosen = CONFIGURATIONS[:configurations]
    total = sum(configuration.share for configuration in chosen)
    for number, configuration in enumerate(chosen):
        for which, optimizer in enumerate(OPTIMIZERS):
            rng = np.random.default_rng([number, which])
            count = max(1, round(trainings * configuration.share / total / len(OPTIMIZERS)))
            low, high = np.log(RATES[optimizer])
            drawn = [
                Training(seed, float(np.exp(rng.uniform(low, high))), int(rng.integers(1, MAX_EPOCHS + 1)))
                for seed in range(count)
            ]
            # Runs that train in parallel take about the same time.
            yield configuration, optimizer, sorted(drawn, key=lambda training: training.epochs)


def generate(
    out: Path,
    trainings: int,
    console: Console,
    *,
    configurations: int = len(CONFIGURATIONS),
    fresh: bool = False,
) -> pl.DataFrame:
    """Trains, and writes ``runs.parquet`` with one row per sample. Resumes after an interruption.

    Args:
      out: output folder.
      trainings: approximate number of training runs; each yields up to ten samples.
      console: for the progress bar.
      configurations: number of configurations to use, from the start of :data:`CONFIGURATIONS`.
      fresh: discard unfinished work.

    Returns:
      The samples, with the columns of :func:`samples_of`, ``configuration``, ``optimizer``, ``seed``,
      ``learning_rate`` and ``epochs``.
    """
    settings = {
        "trainings": trainings,
        "configurations": [configuration.name for configuration in CONFIGURATIONS[:configurations]],
        "rates": RATES,
        "epoch_steps": EPOCH_STEPS,
        "version": greedylr_jax.__version__,
    }
    store = RunStore(out, settings, fresh=fresh)
    planned = list(plan(trainings, configurations))
    remaining = _without_finished(planned, store.rows())
    total, num_remaining = (sum(len(runs) for _, _, runs in each) for each in (planned, remaining))
    with make_progress(console, "trainings") as progress:
        bar = progress.add_task("", total=total, completed=total - num_remaining)
        for configuration, optimizer, runs in remaining:
            progress.update(bar, description=f"{configuration.name}, {optimizer}")
            for group, trained in _train(configuration, optimizer, runs) if runs else ():
                rows = _rows(configuration, optimizer, group, trained)
                if rows:
                    store.append(rows)
                progress.update(bar, advance=len(group))
    samples = store.finish()
    console.print(f"{len(samples)} samples are in {out / 'runs.parquet'}.")
    console.print(label_shares(samples))
    return samples


def _without_finished(planned: Sequence[Planned], finished: pl.DataFrame | None) -> list[Planned]:
    """The planned training runs without those that have rows in ``finished``."""
    if finished is None:
        return list(planned)
    done = set(finished.select("configuration", "optimizer", "seed").iter_rows())
    return [
        (
            configuration,
            optimizer,
            [run for run in runs if (configuration.name, optimizer, run.seed) not in done],
        )
        for configuration, optimizer, runs in planned
    ]


def _rows(
    configuration: Configuration, optimizer: str, group: Sequence[Training], trained: Sequence[Rounds]
) -> list[dict[str, Any]]:
    """The samples of a group of finished training runs as rows of ``runs.parquet``."""
    return [
        {"configuration": configuration.name, "optimizer": optimizer} | training._asdict() | sample
        for training, rounds in zip(group, trained, strict=True)
        for sample in samples_of(training, rounds)
    ]


def label_shares(samples: pl.DataFrame) -> str:
    """A sentence with the share of each label after and before the correction."""
    shares = []
    for column in ("uncorrected", "label"):
        share = [100 * (samples[column] == index).mean() for index in range(len(ACTIONS))]
        shares.append(", ".join(f"{name} {value:.1f}%" for name, value in zip(ACTIONS, share, strict=True)))
    return f"Labels: {shares[1]} (before correction: {shares[0]})."


def _train(
    configuration: Configuration, optimizer: str, trainings: Sequence[Training]
) -> Iterator[tuple[Sequence[Training], list[Rounds]]]:
    """Trains one run per device in parallel, and yields each group as it finishes."""
    task, mesh = configuration.make(), device_mesh()
    data = place((task.train, task.test), mesh)
    train_one = functools.partial(train_rounds, task, OPTIMIZERS[optimizer])

    def on_one_device(data: Any, training: Training) -> Rounds:
        return jax.tree.map(
            lambda leaf: leaf[None], train_one(data, Training(*(leaf[0] for leaf in training)))
        )

    mapped = side_by_side(on_one_device, mesh, split=(False, True))
    program = None
    for start in range(0, len(trainings), mesh.size):
        group = trainings[start : start + mesh.size]
        filled = [*group, *[group[-1]._replace(epochs=0)] * (mesh.size - len(group))]  # idle devices
        inputs = Training(
            *(
                np.array(values, kind)
                for values, kind in zip(zip(*filled, strict=True), ("u4", "f4", "i4"), strict=True)
            )
        )
        if program is None:
            program = jax.jit(mapped).lower(data, inputs).compile(compiler_options=compiler_options())
        results = jax.device_get(program(data, inputs))
        yield group, [jax.tree.map(lambda leaf, row=row: leaf[row], results) for row in range(len(group))]
