"""Samples for ARC: what a training looked like, and which change of rate did best from there.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Sections 3.2 and
3.3. A training has ten rounds. In each the network trains for n epochs; from there three branches train n
epochs more, with the rate raised, kept and lowered; that with the lowest validation loss is the label. Then
the rate of the worst is dropped, one of the other two is drawn, and the next round goes on from the
checkpoint with it. As that trains the same branch again, with other batches, it shows how far the comparison
can be trusted: where the order of the three losses would be another with the new one, the label becomes
"keep".
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
from experiments.training.engine import compiler_options, device_mesh, place, side_by_side, take
from experiments.training.store import RunStore
from greedylr_jax.arc import ACTIONS
from greedylr_jax.arc._controller import MULTIPLIERS
from greedylr_jax.arc._features import MAX_CYCLES

ROUNDS = 10
MAX_EPOCHS = 10  # of a round
EPOCH_STEPS = 20  # an epoch of tasks this small would be too few or too many
_KEEP = ACTIONS.index("keep")
_PARTS = 1 + len(ACTIONS)  # of a round: the training itself, and its branches


class Training(NamedTuple):
    """One training that samples are taken of."""

    seed: int
    learning_rate: float
    epochs: int  # of a round


class Rounds(NamedTuple):
    """What a training leaves: a row a round, and one more, whose end checks the label of the last."""

    train_loss: np.ndarray  # shape=(rounds + 1, MAX_EPOCHS * EPOCH_STEPS); NaN beyond the round
    validation_loss: np.ndarray  # shape=(rounds + 1, MAX_EPOCHS); NaN beyond the round
    rate: np.ndarray  # shape=(rounds + 1,)
    branch_loss: np.ndarray  # shape=(rounds, 3); validation losses at the ends of the branches
    drawn: np.ndarray  # shape=(rounds,); the branch that the next round repeats


def correct_label(branch_loss: np.ndarray, drawn: int, repeated: float) -> int:
    """The label of a round, corrected.

    Args:
      branch_loss: validation losses of raising, keeping and lowering, shape (3,); infinite if they diverged.
      drawn: the branch that was trained again.
      repeated: its validation loss then.

    Returns:
      The index of the lowest, or "keep" where the order of the three depends on the random numbers.

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
    """One training; ``data`` and ``training`` may be traced.

    Rounds and branches are parts of one loop, so that a training step is compiled once.
    """
    train, test = data
    most = MAX_EPOCHS * EPOCH_STEPS
    multipliers = jnp.asarray((1.0, *MULTIPLIERS), jnp.float32)  # of each part of a round
    init_key, run_key = jax.random.split(jax.random.key(training.seed))

    def train_part(start: tuple[Any, Any], rate: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        """A round's epochs; batches are drawn with replacement, as an epoch here is a number of steps."""

        def step(index: jax.Array, carry: Any) -> Any:
            params, state, losses, validation = carry
            drawn = jax.random.randint(
                jax.random.fold_in(key, index), (task.batch_size,), 0, task.num_examples
            )
            loss, grads = jax.value_and_grad(task.loss)(params, take(train, drawn))
            updates, state = make_optimizer(rate).update(grads, state, params)
            params = optax.apply_updates(params, updates)
            epoch = index // EPOCH_STEPS
            measured = jax.lax.cond(
                (index + 1) % EPOCH_STEPS == 0, lambda: task.loss(params, test), lambda: validation[epoch]
            )
            return params, state, losses.at[index].set(loss), validation.at[epoch].set(measured)

        nothing = jnp.full(most, jnp.nan), jnp.full(MAX_EPOCHS, jnp.nan)
        *end, losses, validation = jax.lax.fori_loop(
            0, training.epochs * EPOCH_STEPS, step, (*start, *nothing)
        )
        return tuple(end), losses, validation

    def one_part(carry: Any, inputs: Any) -> Any:
        checkpoint, rate, ends, drawn = carry
        part, key = inputs
        end, losses, validation = train_part(checkpoint, rate * multipliers[part], key)
        checkpoint = jax.tree.map(lambda new, old: jnp.where(part == 0, new, old), end, checkpoint)
        reached = validation[training.epochs - 1]
        ends = jnp.where(jnp.arange(_PARTS) == part, jnp.where(jnp.isfinite(reached), reached, jnp.inf), ends)
        # Of the two that are not the worst one is drawn; of equally bad ones the first is the worst.
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
    begins, finishes = slice(0, None, _PARTS), slice(_PARTS - 1, None, _PARTS)
    return Rounds(losses[begins], validation[begins], rates[begins], ends[finishes], drawn[finishes])


def samples_of(training: Training, rounds: Rounds) -> Iterator[dict[str, Any]]:
    """The samples of a training: histories of up to three rounds, and the corrected label.

    There are none from where it diverged.
    """
    steps = training.epochs * EPOCH_STEPS
    for index in range(ROUNDS):
        seen = slice(max(0, index + 1 - MAX_CYCLES), index + 1)
        train, validation = (
            rounds.train_loss[seen, :steps],
            rounds.validation_loss[seen, : training.epochs],
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
            "rates": rounds.rate[seen].tolist(),
            "branch_loss": ends.tolist(),
            "drawn": int(rounds.drawn[index]),
            "repeated": repeated,
            "uncorrected": int(np.argmin(ends)),
            "label": correct_label(ends, int(rounds.drawn[index]), repeated),
        }


def plan(
    trainings: int, configurations: int = len(CONFIGURATIONS)
) -> Iterator[tuple[Configuration, str, list[Training]]]:
    """What is trained: for each configuration and optimizer, trainings with random rates and epochs.

    Args:
      trainings: about how many in all; each configuration gets its share, and each optimizer one at least.
      configurations: how many of :data:`CONFIGURATIONS`, the first ones.
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
            # Those that are trained side by side should end together.
            yield configuration, optimizer, sorted(drawn, key=lambda training: training.epochs)


def generate(
    out: Path,
    trainings: int,
    console: Console,
    *,
    configurations: int = len(CONFIGURATIONS),
    fresh: bool = False,
) -> pl.DataFrame:
    """Trains, and leaves ``runs.parquet`` with one row a sample; goes on where it stopped.

    Args:
      out: folder.
      trainings: about how many; each gives up to ten samples.
      console: for the progress bar.
      configurations: how many of :data:`CONFIGURATIONS`, the first ones.
      fresh: drop what an interrupted call left.

    Returns:
      The samples, with the columns of :func:`samples_of`, ``configuration``, ``optimizer``, ``seed``,
      ``learning_rate`` and ``epochs``.
    """
    described = {
        "trainings": trainings,
        "configurations": [configuration.name for configuration in CONFIGURATIONS[:configurations]],
        "rates": RATES,
        "epoch_steps": EPOCH_STEPS,
        "version": greedylr_jax.__version__,
    }
    store = RunStore(out, described, fresh=fresh)
    kept = store.rows()
    done = set() if kept is None else set(kept.select("configuration", "optimizer", "seed").iter_rows())
    planned = [
        (configuration, optimizer, [t for t in all_ if (configuration.name, optimizer, t.seed) not in done])
        for configuration, optimizer, all_ in plan(trainings, configurations)
    ]
    left = sum(len(each) for _, _, each in planned)
    with make_progress(console, "trainings") as progress:
        total = sum(len(each) for _, _, each in plan(trainings, configurations))
        bar = progress.add_task("", total=total, completed=total - left)
        for configuration, optimizer, each in planned:
            progress.update(bar, description=f"{configuration.name}, {optimizer}")
            for group, trained in _train(configuration, optimizer, each) if each else ():
                rows = [
                    {"configuration": configuration.name, "optimizer": optimizer}
                    | training._asdict()
                    | sample
                    for training, rounds in zip(group, trained, strict=True)
                    for sample in samples_of(training, rounds)
                ]
                if rows:
                    store.append(rows)
                progress.update(bar, advance=len(group))
    samples = store.finish()
    console.print(f"{len(samples)} samples are in {out / 'runs.parquet'}.")
    console.print(label_shares(samples))
    return samples


def label_shares(samples: pl.DataFrame) -> str:
    """How often each label is given, before and after its correction, in words."""
    shares = []
    for column in ("uncorrected", "label"):
        share = [100 * (samples[column] == index).mean() for index in range(len(ACTIONS))]
        shares.append(", ".join(f"{name} {value:.1f}%" for name, value in zip(ACTIONS, share, strict=True)))
    return f"Labels: {shares[1]} (before their correction {shares[0]})."


def _train(
    configuration: Configuration, optimizer: str, trainings: Sequence[Training]
) -> Iterator[tuple[Sequence[Training], list[Rounds]]]:
    """Trains side by side, one training a device, and yields each group as it ends."""
    task, mesh = configuration.make(), device_mesh()
    data = place((task.train, task.test), mesh)
    alone = functools.partial(train_rounds, task, OPTIMIZERS[optimizer])

    def on_one_device(data: Any, training: Training) -> Rounds:
        return jax.tree.map(lambda leaf: leaf[None], alone(data, Training(*(leaf[0] for leaf in training))))

    mapped = side_by_side(on_one_device, mesh, split=(False, True))
    program = None
    for start in range(0, len(trainings), mesh.size):
        group = trainings[start : start + mesh.size]
        filled = [*group, *[group[-1]._replace(epochs=0)] * (mesh.size - len(group))]  # nothing to do there
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
