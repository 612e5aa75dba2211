"""Samples for ARC: what a training looked like, and which change of rate did best from there.

Paper: X. Dong et al., "To Raise or Not To Raise", Sections 3.2 and 3.3. A training has ten rounds. In each round (1) the
network trains for n epochs; from there three branches train n epochs more, with the rate raised, kept and lowered; the
branch with the lowest validation loss is the label. Then the rate of the worst is dropped, one of the other two is drawn,
and the next round goes on from the checkpoint with that. As it trains the same branch again with other batches, it shows
how far the comparison can be trusted: where the order of the three losses would be another with the new one, the label
becomes "keep".
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.arc.configurations import CONFIGURATIONS, OPTIMIZERS, Configuration
from experiments.tasks.base import Task
from greedylr_jax.arc.controller import MULTIPLIERS

ROUNDS = 10
MAX_EPOCHS = 10  # of a cycle
EPOCH_STEPS = 15
KEEP = 1
Row = dict[str, Any]


class Rounds(NamedTuple):
    """What a training leaves, a row for each of :data:`ROUNDS` rounds and one more for the last label's check."""

    train_loss: np.ndarray  # shape=(rounds, MAX_EPOCHS * EPOCH_STEPS); NaN beyond the cycle
    validation_loss: np.ndarray  # shape=(rounds, MAX_EPOCHS); NaN beyond the cycle
    rate: np.ndarray  # shape=(rounds,)
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
    return int(np.argmin(branch_loss)) if same_order else KEEP


def train_rounds(task: Task, optimizer: str, seed: jax.Array, rate: jax.Array, epochs: jax.Array) -> Rounds:
    """One training; all arguments but the first two may be traced."""
    tx = OPTIMIZERS[optimizer]
    most = MAX_EPOCHS * EPOCH_STEPS
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = task.init(init_key)

    def cycle(params: Any, state: Any, rate: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        """``epochs`` epochs; batches are drawn with replacement, as an epoch here is a number of steps."""

        def step(index: jax.Array, carry: Any) -> Any:
            params, state, losses, validation = carry
            drawn = jax.random.randint(
                jax.random.fold_in(key, index), (task.batch_size,), 0, task.num_examples
            )
            batch = jax.tree.map(lambda rows: jnp.asarray(rows)[drawn], task.train)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx(rate).update(grads, state, params)
            params = optax.apply_updates(params, updates)
            ends_epoch = (index + 1) % EPOCH_STEPS == 0
            place = index // EPOCH_STEPS
            measured = jax.lax.cond(
                ends_epoch, lambda: task.loss(params, task.test), lambda: validation[place]
            )
            return params, state, losses.at[index].set(loss), validation.at[place].set(measured)

        empty = jnp.full(most, jnp.nan), jnp.full(MAX_EPOCHS, jnp.nan)
        return jax.lax.fori_loop(0, epochs * EPOCH_STEPS, step, (params, state, *empty))

    def one_round(carry: Any, key: jax.Array) -> Any:
        params, state, rate = carry
        trunk_key, branch_key, draw_key = jax.random.split(key, 3)
        params, state, losses, validation = cycle(params, state, rate, trunk_key)

        def branch(inputs: Any) -> jax.Array:
            multiplier, key = inputs
            reached = cycle(params, state, rate * multiplier, key)[3][epochs - 1]
            return jnp.where(jnp.isfinite(reached), reached, jnp.inf)

        multipliers = jnp.asarray(MULTIPLIERS, jnp.float32)
        ends = jax.lax.map(branch, (multipliers, jax.random.split(branch_key, 3)))
        # Of the two that are not the worst one is drawn; of equally bad ones the first is the worst.
        others = (jnp.argmax(ends) + jnp.array([1, 2])) % 3
        drawn = others[jax.random.randint(draw_key, (), 0, 2)]
        return (params, state, rate * multipliers[drawn]), (losses, validation, rate, ends, drawn)

    keys = jax.random.split(run_key, ROUNDS + 1)
    start = params, tx(rate).init(params), rate
    return Rounds(*jax.lax.scan(one_round, start, keys)[1])


def rows_of(configuration: str, optimizer: str, seed: int, epochs: int, rounds: Rounds) -> Iterator[Row]:
    """The samples of a training: histories of up to three cycles and the corrected label."""
    steps = epochs * EPOCH_STEPS
    for index in range(ROUNDS):
        cycles = slice(max(0, index - 2), index + 1)
        train = rounds.train_loss[cycles, :steps]
        validation = rounds.validation_loss[cycles, :epochs]
        if not (np.isfinite(train).all() and np.isfinite(validation).all()):
            break  # diverged: there is nothing left to learn from
        repeated = rounds.validation_loss[index + 1, epochs - 1]
        ends = rounds.branch_loss[index].astype(float)
        yield {
            "configuration": configuration,
            "optimizer": optimizer,
            "seed": seed,
            "epochs": epochs,
            "round": index,
            "train_loss": train.astype(np.float32).tolist(),
            "validation_loss": validation.astype(np.float32).tolist(),
            "rates": rounds.rate[cycles].astype(np.float32).tolist(),
            "branch_loss": ends.tolist(),
            "repeated": float(repeated),
            "raw_label": int(np.argmin(ends)),
            "label": correct_label(
                ends, int(rounds.drawn[index]), float(repeated) if np.isfinite(repeated) else np.inf
            ),
        }


def plan(trainings: int, seed: int = 0) -> list[tuple[Configuration, str, int, float, int]]:
    """What is trained: configuration, optimizer, seed, initial rate and epochs of a cycle, each drawn at random.

    Args:
      trainings: about how many; each configuration gets its share, and each optimizer in turn.
      seed: of the drawing.
    """
    total = sum(configuration.share for configuration in CONFIGURATIONS)
    planned = []
    for place, configuration in enumerate(CONFIGURATIONS):
        rng = np.random.default_rng([seed, place])
        for index in range(max(3, round(trainings * configuration.share / total))):
            optimizer = list(OPTIMIZERS)[index % len(OPTIMIZERS)]
            low, high = configuration.rates(optimizer)
            rate = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            planned.append((configuration, optimizer, index, rate, int(rng.integers(1, MAX_EPOCHS + 1))))
    return planned
