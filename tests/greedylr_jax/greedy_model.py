"""GreedyLR in plain Python on NumPy scalars, as an independent model of the compiled rule.

Written from the description of both algorithms, not from the library's code, with the documented
departures: non-finite values count as worse and are not averaged, relative thresholds are margins on the
better side for negative losses too, an increase multiplies by the rounded reciprocal of the factor, and the
minimum rate is at least the smallest normal number.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class GreedyModel:
    """State and settings of one rule; ``observe`` takes a loss and returns the new rate."""

    rate: Any
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    warmup: int
    min_rate: float
    max_rate: float
    window: int | None
    reset_at_min: int | None
    reset_after: int | None
    mode: str
    eps: float
    algorithm: str
    only_decrease: bool = False
    dtype: Any = np.float32
    values: list[Any] = field(default_factory=list)
    good: int = 0
    bad: int = 0
    cooling: int = 0
    warming: int = 0
    observations: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "factor", "threshold", "min_rate", "max_rate", "eps"):
            setattr(self, name, self.dtype(getattr(self, name)))
        self.min_rate = max(self.min_rate, np.finfo(self.dtype).tiny)
        self.initial = self.rate
        self.countdown = self.reset_at_min
        self.best = self.worst_possible

    @property
    def worst_possible(self) -> Any:
        return self.dtype(math.inf if self.mode == "min" else -math.inf)

    def observe(self, value: float) -> Any:
        value = self.dtype(value)
        mean = self._smooth(value)
        step = self._reference if self.algorithm == "reference" else self._paper
        step(mean)
        return self.rate

    def _smooth(self, value: Any) -> Any:
        """The mean of the last finite values, or None for a value that is not finite."""
        if not np.isfinite(value):
            return None
        if self.window is None:
            return value
        self.values = [*self.values, value][-self.window :]
        return self.dtype(np.sum(np.array(self.values, self.dtype)) / self.dtype(len(self.values)))

    def _improves(self, mean: Any) -> bool:
        if mean is None:
            return False
        if not np.isfinite(self.best):
            return True
        sign = self.dtype(1 if self.mode == "min" else -1)
        best, mean = sign * self.best, sign * mean
        if self.threshold_mode == "abs":
            return bool(mean < best - self.threshold)
        one = self.dtype(1)
        return bool(mean < best * (one + self.threshold if best < 0 else one - self.threshold))

    def _reference(self, mean: Any) -> None:
        self.observations += 1
        raised = lowered = False
        if self.cooling > 0 or self.warming > 0:
            self.good = self.bad = 0
            if self.cooling > 0:
                self.cooling -= 1
            else:
                self.warming -= 1
        elif self._improves(mean):
            self.best, self.good, self.bad = mean, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if self.good > self.patience and not self.only_decrease:
            raised = True
            proposal = min(self.rate * (self.dtype(1) / self.factor), self.max_rate)
            if proposal - self.rate > self.eps:
                self.rate = proposal
            self.good, self.warming, self.countdown = 0, self.warmup, self.reset_at_min
        elif self.bad > self.patience:
            lowered = True
            proposal = max(self.rate * self.factor, self.min_rate)
            if self.rate - proposal > self.eps:
                self.rate = proposal
            self.bad = 0
            if self.reset_at_min is not None and self.rate <= self.min_rate:
                self.countdown -= 1
                if self.countdown == 0:
                    self._reset()
            self.cooling = self.cooldown
        assert not (raised and lowered)
        if self.reset_after is not None and self.observations > self.reset_after:
            self._reset()

    def _reset(self) -> None:
        self.rate, self.best = self.initial, self.worst_possible
        self.good = self.bad = self.cooling = self.warming = self.observations = 0
        self.countdown, self.values = self.reset_at_min, []

    def _paper(self, mean: Any) -> None:
        self.observations += 1
        if self._improves(mean):
            self.best, self.good, self.bad = mean, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if self.cooling < self.cooldown:
            self.cooling, self.good = self.cooling + 1, 0
        else:
            self.cooling = 0
        if self.warming < self.warmup:
            self.warming, self.bad = self.warming + 1, 0
        else:
            self.warming = 0
        if self.good > self.patience and not self.only_decrease:
            self.rate = self.rate * (self.dtype(1) / self.factor)
        if self.bad > self.patience:
            self.rate = self.rate * self.factor
        if self.reset_after is not None and self.observations > self.reset_after:
            self.rate, self.good, self.bad, self.values, self.observations = self.initial, 0, 0, [], 0
        self.rate = min(max(self.rate, self.min_rate), self.max_rate)
