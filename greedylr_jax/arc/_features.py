"""What ARC's network sees: losses and rates of the last one to three cycles, brought to 300 rows.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4. Where
the paper and its published code differ, the code is followed, on whose features the published weights work:
training losses are resized by linear interpolation (the paper says nearest neighbour), and normalised after
that.

:func:`batch_features` takes whole histories, on the host. :class:`FeatureStream` gives the same features
inside a compiled step, from arrays of a fixed size: which losses of a cycle are ever looked at follows from
its length alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_CYCLES = 3
ROWS_PER_CYCLE = 100
ROWS = MAX_CYCLES * ROWS_PER_CYCLE
_LEAST_DEVIATION = 1e-7
# Greater losses are divided by a power of two, which leaves their standardized values as they are: their
# squares would overflow.
_GREAT, _DIVISOR = np.float32(2.0**50), np.float32(2.0**80)


def batch_features(
    train_losses: Sequence[Sequence[float]],
    validation_losses: Sequence[Sequence[float]],
    learning_rates: Sequence[float],
) -> np.ndarray:
    """The features of whole histories.

    Args:
      train_losses: of each cycle, oldest first, the losses of its steps; at most the last three cycles are
        used.
      validation_losses: of each cycle the validation losses in it, in the same order; all zeros, or empty,
        where there is no validation.
      learning_rates: of each cycle the rate at its end.

    Returns:
      Shape (300, 3), float32: training losses, validation losses, rates. With k cycles the last 100 k rows
      are theirs; the rows before are 0, 0 and 1.

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
    """For each row the two values that it lies between, and the weight of the second.

    Half-pixel centres, no antialiasing; the place is computed in double and rounded to float32, as published.
    """
    place = ((np.arange(rows) + 0.5) * (1 / (rows / count)) - 0.5).astype(np.float32)
    low = np.floor(place)
    weight = place - low
    low = low.astype(np.int64)
    return np.clip(low, 0, count - 1), np.clip(low + 1, 0, count - 1), weight


def _nearest(count: int, rows: int) -> np.ndarray:
    """For each row the value that is repeated or kept; in double, with its rounding, as published."""
    return np.minimum(np.floor(np.arange(rows) * (1 / (rows / count))).astype(np.int64), count - 1)


def _standardize(values: np.ndarray) -> np.ndarray:
    if np.max(np.abs(values)) > _GREAT:
        values = values / _DIVISOR
    return (values - values.mean()) / np.maximum(values.std(), np.float32(_LEAST_DEVIATION))


class History(NamedTuple):
    """What a stream keeps of the last three cycles, the current one last."""

    train: jax.Array  # shape=(3, kept), dtype=float32; the losses that some row is made of
    validation: jax.Array  # shape=(3, max_validations), dtype=float32
    validation_count: jax.Array  # shape=(3,), dtype=int32
    rates: jax.Array  # shape=(3,), dtype=float; at the end of each cycle


class FeatureStream:
    """The features of :func:`batch_features`, of histories that come step by step, in arrays of a fixed size.

    All methods are pure functions of arrays.

    Examples:
      >>> stream = FeatureStream(steps_per_cycle=2, max_validations=4)
      >>> history = stream.init()
      >>> for step, loss in enumerate([3.0, 1.0]):
      ...     history = stream.add_loss(history, jnp.int32(step), jnp.float32(loss))
      >>> features = stream.features(history._replace(rates=jnp.array([1.0, 1.0, 0.5])), jnp.int32(1))
      >>> bool(jnp.allclose(features, batch_features([[3.0, 1.0]], [[]], [0.5]), atol=1e-5))
      True
    """

    def __init__(self, steps_per_cycle: int, max_validations: int):
        """Finds out which losses will be looked at.

        Args:
          steps_per_cycle: losses in a cycle, >= 1.
          max_validations: validation losses kept of each cycle, >= 1; of more the last are kept.
        """
        self.max_validations = max_validations
        taps = [_linear_taps(cycles * steps_per_cycle, cycles * ROWS_PER_CYCLE) for cycles in (1, 2, 3)]
        looked_at = [index for low, high, _ in taps for index in (low, high)]
        self._kept = np.unique(np.concatenate(looked_at) % steps_per_cycle)
        # For each number of cycles, where in the kept losses (flattened, oldest first) each row's two lie.
        self._low, self._high = np.zeros((2, MAX_CYCLES, ROWS), np.int32)
        self._weight = np.zeros((MAX_CYCLES, ROWS), np.float32)
        self._used = np.zeros((MAX_CYCLES, ROWS), bool)
        for cycles, (low, high, weight) in enumerate(taps, start=1):
            rows = np.s_[cycles - 1, ROWS - cycles * ROWS_PER_CYCLE :]
            self._low[rows], self._high[rows] = (
                len(self._kept) * (MAX_CYCLES - cycles + index // steps_per_cycle)
                + np.searchsorted(self._kept, index % steps_per_cycle)
                for index in (low, high)
            )
            self._weight[rows], self._used[rows] = weight, True
        self._nearest = _nearest_table(max_validations)

    def init(self) -> History:
        """A history of nothing."""
        return History(
            train=jnp.zeros((MAX_CYCLES, len(self._kept)), jnp.float32),
            validation=jnp.zeros((MAX_CYCLES, self.max_validations), jnp.float32),
            validation_count=jnp.zeros((MAX_CYCLES,), jnp.int32),
            rates=jnp.ones((MAX_CYCLES,), jnp.float32),
        )

    def add_loss(self, history: History, step: jax.Array, loss: jax.Array) -> History:
        """Enters the loss of a step of the current cycle, counted from 0; of a long cycle few are kept."""
        kept = jnp.asarray(self._kept)
        slot = jnp.minimum(jnp.searchsorted(kept, step), len(kept) - 1)
        current = history.train[-1, slot]
        entered = jnp.where(kept[slot] == step, loss.astype(current.dtype), current)
        return history._replace(train=history.train.at[-1, slot].set(entered))

    def add_validation(self, history: History, loss: jax.Array) -> History:
        """Enters a validation loss of the current cycle; NaN stands for none."""
        count, losses = history.validation_count[-1], history.validation[-1]
        full = count == self.max_validations
        losses = jnp.where(full, jnp.roll(losses, -1), losses)
        losses = losses.at[jnp.minimum(count, self.max_validations - 1)].set(loss.astype(losses.dtype))
        after = jnp.minimum(count + 1, self.max_validations)
        is_there = ~jnp.isnan(loss)
        return history._replace(
            validation=history.validation.at[-1].set(jnp.where(is_there, losses, history.validation[-1])),
            validation_count=history.validation_count.at[-1].set(jnp.where(is_there, after, count)),
        )

    def next_cycle(self, history: History) -> History:
        """Forgets the oldest cycle, and begins a new one."""
        shifted = jax.tree.map(lambda kept: jnp.roll(kept, -1, axis=0).at[-1].set(0), history)
        return shifted._replace(rates=shifted.rates.at[-1].set(1))

    def features(self, history: History, cycles: jax.Array) -> jax.Array:
        """The features of the last ``cycles`` (1 to 3) cycles, shape (300, 3), at the end of the current
        one.
        """
        which = cycles - 1
        used, flat = jnp.asarray(self._used)[which], history.train.ravel()
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
    """The index of each row for 1 to 3 cycles and every number of validation losses."""
    most = MAX_CYCLES * max_validations
    table = np.zeros((MAX_CYCLES, most + 1, ROWS), np.int16)
    for cycles in range(1, MAX_CYCLES + 1):
        for count in range(1, most + 1):
            table[cycles - 1, count, : cycles * ROWS_PER_CYCLE] = _nearest(count, cycles * ROWS_PER_CYCLE)
    return table


def _standardize_where(values: jax.Array, used: jax.Array) -> jax.Array:
    """The values over their deviation from the mean of those used; 0 for the others."""
    is_great = jnp.max(jnp.abs(values), where=used, initial=0) > _GREAT
    values = jnp.where(is_great, values / _DIVISOR, values)
    count = jnp.maximum(jnp.sum(used), 1).astype(values.dtype)
    mean = jnp.sum(jnp.where(used, values, 0)) / count
    centred = jnp.where(used, values - mean, 0)
    deviation = jnp.sqrt(jnp.sum(centred**2) / count)
    return centred / jnp.maximum(deviation, _LEAST_DEVIATION)
