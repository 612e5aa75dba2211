"""Features of ARC's network: losses and rates of the last one to three cycles, resized to 300 rows.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4. Where
the paper and its published code differ, this module follows the code, since the published weights were
trained on its features: training losses are resized by linear interpolation (in the paper by nearest
neighbour) and normalised after that.

:func:`batch_features` computes them from whole histories on the host. :class:`FeatureStream` computes the
same features inside a compiled step from arrays of a fixed size: the length of a cycle alone determines which
of its losses are used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MAX_CYCLES = 3
ROWS_PER_CYCLE = 100
ROWS = MAX_CYCLES * ROWS_PER_CYCLE
_MIN_DEVIATION = 1e-7
# The squares of losses above _LARGE could overflow. Dividing by a power of two does not change standardized
# values.
_LARGE, _DIVISOR = np.float32(2.0**50), np.float32(2.0**80)


def batch_features(
    train_losses: Sequence[Sequence[float]],
    validation_losses: Sequence[Sequence[float]],
    learning_rates: Sequence[float],
) -> np.ndarray:
    """Computes the features of whole histories.

    Args:
      train_losses: for each cycle, oldest first, the losses of its steps; only the last three cycles are
        used.
      validation_losses: for each cycle its validation losses, in the same order; all zeros, or empty, without
        validation.
      learning_rates: for each cycle the learning rate at its end.

    Returns:
      Array of shape (300, 3), float32; columns are training losses, validation losses and learning rates. The
      last 100 k rows hold the features of k cycles; the rows before them are padding (0, 0, 1).

    Raises:
      ValueError: if there is no cycle, a cycle has no training loss, or the lists differ in length.

    Examples:
      >>> features = batch_features([[3.0, 2.0, 1.0]], [[0.5]], [0.1])
      >>> print(features.shape, features[0], features[200].round(2))
      (300, 3) [0. 0. 1.] [1.34 0.   1.  ]

    Source: Section 3.4 and the published preprocessing.
    """
    if not len(train_losses) == len(validation_losses) == len(learning_rates) >= 1:
        raise ValueError(
            "train_losses, validation_losses and learning_rates must have one entry for each cycle, at least "
            f"one; got {len(train_losses)}, {len(validation_losses)} and {len(learning_rates)} entries."
        )
    if not all(len(losses) for losses in train_losses[-MAX_CYCLES:]):
        raise ValueError("train_losses must hold at least one loss for each cycle, got an empty cycle.")
    cycles = min(len(train_losses), MAX_CYCLES)
    rows = ROWS_PER_CYCLE * cycles

    train = np.concatenate([np.asarray(losses, np.float32) for losses in train_losses[-cycles:]])
    low, high, weight = _linear_taps(len(train), rows)
    resized = train[low] * (np.float32(1) - weight) + train[high] * weight

    validation = np.concatenate(
        [np.asarray(losses, np.float32) for losses in validation_losses[-cycles:]]
        or [np.zeros(0, np.float32)]
    )
    if len(validation):
        chosen = _standardize(validation)[_nearest(len(validation), rows)]
    else:
        chosen = np.zeros(rows, np.float32)

    rates = np.asarray(learning_rates[-cycles:], np.float32)
    rates = (rates / rates[0])[_nearest(cycles, rows)]

    features = np.tile(np.array([0, 0, 1], np.float32), (ROWS, 1))
    features[ROWS - rows :] = np.stack([_standardize(resized), chosen, rates], axis=1)
    return features


def _linear_taps(count: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two values between which each row lies, and the weight of the second.

    Half-pixel centres, no antialiasing; the position is computed in double precision and rounded to float32,
    as in the published code.
    """
    place = ((np.arange(rows) + 0.5) * (1 / (rows / count)) - 0.5).astype(np.float32)
    low = np.floor(place)
    weight = place - low
    low = low.astype(np.int64)
    return np.clip(low, 0, count - 1), np.clip(low + 1, 0, count - 1), weight


def _nearest(count: int, rows: int) -> np.ndarray:
    """The index of the nearest value for each row, in double precision with its rounding, as published."""
    return np.minimum(np.floor(np.arange(rows) * (1 / (rows / count))).astype(np.int64), count - 1)


def _standardize(values: np.ndarray) -> np.ndarray:
    if np.max(np.abs(values)) > _LARGE:
        values = values / _DIVISOR
    return (values - values.mean()) / np.maximum(values.std(), np.float32(_MIN_DEVIATION))


class History(NamedTuple):
    """The last three cycles of a stream. Each has a row; a new cycle replaces the oldest one.

    What a row held before is not erased: every loss that is used is written before the end of its cycle.
    """

    train: (
        jax.Array
    )  # shape=(3, used + 1), dtype=float32; losses that features use, last one that they do not
    validation: jax.Array  # shape=(3, max_validations), dtype=float32
    validation_count: jax.Array  # shape=(3,), dtype=int32
    rates: jax.Array  # shape=(3,), dtype=float; at the end of each cycle
    row: jax.Array  # shape=(), dtype=int32; the row of the current cycle


class FeatureStream:
    """Computes the features of :func:`batch_features` step by step, with arrays of a fixed size.

    All methods are pure functions of arrays.

    Examples:
      >>> stream = FeatureStream(steps_per_cycle=2, max_validations=4)
      >>> history = stream.init()
      >>> for step, loss in enumerate([3.0, 1.0]):
      ...     history = stream.add_loss(history, jnp.int32(step), jnp.float32(loss))
      >>> features = stream.features(history._replace(rates=jnp.array([0.5, 1.0, 1.0])), jnp.int32(1))
      >>> bool(jnp.allclose(features, batch_features([[3.0, 1.0]], [[]], [0.5]), atol=1e-5))
      True
    """

    def __init__(self, steps_per_cycle: int, max_validations: int):
        """Computes which losses are used.

        Args:
          steps_per_cycle: number of losses in a cycle, >= 1.
          max_validations: number of validation losses used per cycle, >= 1; of more the last ones are used.
        """
        self.max_validations = max_validations
        taps = [_linear_taps(cycles * steps_per_cycle, cycles * ROWS_PER_CYCLE) for cycles in (1, 2, 3)]
        indices = [index for low, high, _ in taps for index in (low, high)]
        self._used_steps = np.unique(np.concatenate(indices) % steps_per_cycle)
        # The column of each step, the last one where no row uses it. There are at most 601 columns.
        self._columns = np.full(steps_per_cycle, len(self._used_steps), np.int16)
        self._columns[self._used_steps] = np.arange(len(self._used_steps))
        # For each number of cycles, the positions of each row's two losses in the flattened history.
        self._low, self._high = np.zeros((2, MAX_CYCLES, ROWS), np.int32)
        self._weight = np.zeros((MAX_CYCLES, ROWS), np.float32)
        self._is_used = np.zeros((MAX_CYCLES, ROWS), bool)
        for cycles, (low, high, weight) in enumerate(taps, start=1):
            rows = np.s_[cycles - 1, ROWS - cycles * ROWS_PER_CYCLE :]
            self._low[rows], self._high[rows] = (
                (len(self._used_steps) + 1) * (MAX_CYCLES - cycles + index // steps_per_cycle)
                + np.searchsorted(self._used_steps, index % steps_per_cycle)
                for index in (low, high)
            )
            self._weight[rows], self._is_used[rows] = weight, True
        self._nearest = _nearest_table(max_validations)

    def init(self) -> History:
        """An empty history."""
        return History(
            train=jnp.zeros((MAX_CYCLES, len(self._used_steps) + 1), jnp.float32),
            validation=jnp.zeros((MAX_CYCLES, self.max_validations), jnp.float32),
            validation_count=jnp.zeros((MAX_CYCLES,), jnp.int32),
            rates=jnp.ones((MAX_CYCLES,), jnp.float32),
            row=jnp.zeros((), jnp.int32),
        )

    def add_loss(self, history: History, step: jax.Array, loss: jax.Array) -> History:
        """Adds the loss of a step of the current cycle, counted from 0."""
        column = jnp.asarray(self._columns)[step].astype(jnp.int32)
        loss = loss.astype(history.train.dtype).reshape(1, 1)
        return history._replace(
            train=jax.lax.dynamic_update_slice(history.train, loss, (history.row, column))
        )

    def add_validation(self, history: History, loss: jax.Array) -> History:
        """Adds a validation loss of the current cycle; NaN stands for none."""
        count, losses = history.validation_count[history.row], history.validation[history.row]
        full = count == self.max_validations
        moved = jnp.where(full, jnp.roll(losses, -1), losses)
        moved = moved.at[jnp.minimum(count, self.max_validations - 1)].set(loss.astype(losses.dtype))
        after = jnp.minimum(count + 1, self.max_validations)
        is_present = ~jnp.isnan(loss)
        return history._replace(
            validation=history.validation.at[history.row].set(jnp.where(is_present, moved, losses)),
            validation_count=history.validation_count.at[history.row].set(
                jnp.where(is_present, after, count)
            ),
        )

    def end_cycle(self, history: History, rate: jax.Array, is_end: ArrayLike = True) -> History:
        """Ends the current cycle, at this learning rate, and starts a new one, if ``is_end``."""
        rows, following = np.arange(MAX_CYCLES), (history.row + 1) % MAX_CYCLES
        return history._replace(
            rates=jnp.where(is_end & (rows == history.row), rate.astype(history.rates.dtype), history.rates),
            validation_count=jnp.where(is_end & (rows == following), 0, history.validation_count),
            row=jnp.where(is_end, following, history.row),
        )

    def features(self, history: History, cycles: jax.Array) -> jax.Array:
        """Features of the last ``cycles`` (1 to 3) cycles at the end of the current one, shape (300, 3)."""
        oldest_first = (history.row + 1 + np.arange(MAX_CYCLES)) % MAX_CYCLES
        history = jax.tree.map(lambda rows: rows[oldest_first], history._replace(row=oldest_first))
        which = cycles - 1
        used, flat = jnp.asarray(self._is_used)[which], history.train.ravel()
        weight = jnp.asarray(self._weight)[which]
        low, high = (flat[jnp.asarray(index)[which]] for index in (self._low, self._high))
        train = _standardize_where(low * (1 - weight) + high * weight, used)

        counts = history.validation_count
        total, ends = jnp.sum(counts), jnp.cumsum(counts)
        place = jnp.arange(MAX_CYCLES * self.max_validations)
        cycle = jnp.minimum(jnp.searchsorted(ends, place, side="right"), MAX_CYCLES - 1)
        within = jnp.clip(place - (ends - counts)[cycle], 0, self.max_validations - 1)
        losses = _standardize_where(history.validation[cycle, within], place < total)
        row = jnp.arange(ROWS) - (ROWS - cycles * ROWS_PER_CYCLE)
        index = jnp.asarray(self._nearest)[which, total, jnp.maximum(row, 0)]
        validation = jnp.where(used & (total > 0), losses[index], 0)

        oldest = MAX_CYCLES - cycles
        rates = history.rates[jnp.arange(ROWS) // ROWS_PER_CYCLE] / history.rates[oldest]
        rates = jnp.where(used, rates, 1)
        return jnp.stack([train, validation.astype(train.dtype), rates.astype(train.dtype)], axis=1)


def _nearest_table(max_validations: int) -> np.ndarray:
    """The nearest index of each row for 1 to 3 cycles and every number of validation losses."""
    most = MAX_CYCLES * max_validations
    table = np.zeros((MAX_CYCLES, most + 1, ROWS), np.int16)
    for cycles in range(1, MAX_CYCLES + 1):
        for count in range(1, most + 1):
            table[cycles - 1, count, : cycles * ROWS_PER_CYCLE] = _nearest(count, cycles * ROWS_PER_CYCLE)
    return table


def _standardize_where(values: jax.Array, used: jax.Array) -> jax.Array:
    """Standardizes the values by the mean and deviation of those used; 0 for the others."""
    is_large = jnp.max(jnp.abs(values), where=used, initial=0) > _LARGE
    values = jnp.where(is_large, values / _DIVISOR, values)
    count = jnp.maximum(jnp.sum(used), 1).astype(values.dtype)
    mean = jnp.sum(jnp.where(used, values, 0)) / count
    centred = jnp.where(used, values - mean, 0)
    deviation = jnp.sqrt(jnp.sum(centred**2) / count)
    return centred / jnp.maximum(deviation, _MIN_DEVIATION)
