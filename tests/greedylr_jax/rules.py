"""Tables of all rules, which the tests of adapters, wrappers, checkpoints and dtypes run over."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax.arc import arc, arc_schedule

BASE_RATE = 0.125  # a power of two: base rate times scale is then exact, as is the rate itself


class RuleCase(NamedTuple):
    """One rule in both adapters; both take ``every`` and ``axis_name``."""

    name: str
    transformation: Callable[..., greedylr_jax.GradientTransformationExtraLoss]
    schedule: Callable[..., greedylr_jax.RuleSchedule]
    bounds: tuple[float, float] = (1 / 16, 16.0)  # of the multiplier


def _greedy(name: str, **settings) -> RuleCase:
    bounds = {"min_learning_rate": BASE_RATE / 16, "max_learning_rate": BASE_RATE * 16}
    return RuleCase(
        name,
        lambda **adapter: greedylr_jax.greedy_lr(min_scale=1 / 16, max_scale=16.0, **settings, **adapter),
        lambda **adapter: greedylr_jax.greedy_lr_schedule(BASE_RATE, **bounds, **settings, **adapter),
    )


class ToggleState(NamedTuple):
    scale: jax.Array
    first_scale: jax.Array
    last_value: jax.Array


def _toggle() -> greedylr_jax.Rule:
    """The smallest own rule: doubles after a lower finite loss, else halves, within limits."""

    def init(scale):
        return ToggleState(scale, scale * 1, jnp.full((), jnp.inf, scale.dtype))

    def update(state, value):
        better = value < state.last_value
        scale = jnp.where(better, state.scale * 2, state.scale / 2)
        first = state.first_scale
        return ToggleState(
            jnp.clip(scale, first / 16, first * 16),
            first,
            jnp.where(jnp.isfinite(value), value, state.last_value),
        )

    return greedylr_jax.Rule(init, update, "toggle")


SCALE_RULES = [
    _greedy("greedy-reference", factor=0.5, patience=1, window=4, cooldown=1, reset_at_min=3),
    _greedy("greedy-paper", factor=0.5, patience=1, window=4, algorithm="paper", reset_after=17),
    _greedy("greedy-no-window", factor=0.75, patience=0, window=None, threshold_mode="rel"),
    RuleCase(
        "trend",
        lambda **adapter: greedylr_jax.trend_lr(window=4, min_scale=1 / 16, max_scale=16.0, **adapter),
        lambda **adapter: greedylr_jax.trend_lr_schedule(
            BASE_RATE, window=4, min_learning_rate=BASE_RATE / 16, max_learning_rate=BASE_RATE * 16, **adapter
        ),
    ),
    RuleCase(
        "arc",
        lambda **adapter: arc(steps_per_cycle=4, **adapter),
        lambda **adapter: arc_schedule(BASE_RATE, steps_per_cycle=4, **adapter),
        (0.0, np.inf),
    ),
    RuleCase(
        "own-rule",
        lambda **adapter: greedylr_jax.scale_by_rule(_toggle(), **adapter),
        lambda **adapter: greedylr_jax.schedule_by_rule(_toggle(), BASE_RATE, **adapter),
    ),
]


def rule_parameters() -> list:
    """The rules as parameters of a test; ARC's network takes seconds to compile, each time."""
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name == "arc" else [])
        for case in SCALE_RULES
    ]


def mostly_slow(names: Iterable[str], *fast: str) -> list:
    """The names as parameters of a test, which are slow except for those in ``fast``."""
    names = list(names)
    assert set(fast) <= set(names)
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def thinned(parameters: Iterable, every: int) -> list:
    """Parameters of a test, of which every so many run by default, those that are not slow already."""
    result, number = [], 0
    for each in parameters:
        values, marks = (each.values, each.marks) if hasattr(each, "marks") else ((each,), ())
        if not marks:
            marks = [] if number % every == 0 else pytest.mark.slow
            number += 1
        result.append(pytest.param(*values, marks=marks, id=getattr(each, "id", None)))
    return result


def crossed(rows: Iterable[str], columns: Iterable[str]) -> list:
    """All pairs as parameters of a test; those off the diagonal are slow, each is in some that are not."""
    rows, columns = list(rows), list(columns)
    shorter = min(len(rows), len(columns))
    return [
        pytest.param(row, column, marks=[] if (number - place) % shorter == 0 else pytest.mark.slow)
        for number, row in enumerate(rows)
        for place, column in enumerate(columns)
    ]


# Optimizers with their own learning rate, for parameters {"w": ..., "b": ...}.
RATE_OPTIMIZERS = {
    "hypergradient-global": greedylr_jax.hypergradient(optax.sgd(1.0, momentum=0.9), 0.01, 1e-3),
    "hypergradient-group": greedylr_jax.hypergradient(
        optax.sgd(1.0, momentum=0.9),
        0.01,
        1e-3,
        granularity="group",
        param_labels={"w": "weights", "b": "bias"},
    ),
    "hypergradient-parameter": greedylr_jax.hypergradient(
        optax.sgd(1.0, momentum=0.9), 0.01, 1e-3, granularity="parameter"
    ),
    "hypergradient-multiplicative": greedylr_jax.hypergradient(
        optax.adam(1.0), 0.01, 0.05, mode="multiplicative"
    ),
    "lr_tuner-fit": greedylr_jax.lr_tuner(
        optax.sgd(1.0, momentum=0.9), 0.01, explore_steps=20, recompute_every=3, saturation_threshold=1.0
    ),
    "lr_tuner-taylor": greedylr_jax.lr_tuner(
        optax.adam(1.0), 0.01, explore_steps=20, recompute_every=3, method="taylor", rollback=False
    ),
    "auto_lr": greedylr_jax.auto_lr(optax.sgd(1.0)),
    "with_rollback": greedylr_jax.with_rollback(
        greedylr_jax.hypergradient(optax.sgd(1.0, momentum=0.9), 0.01, 1e-3), window=5, patience=5
    ),
    "factor_polling": optax.chain(
        optax.sgd(0.01, momentum=0.9), greedylr_jax.factor_polling(every=3, sharpness=3.0)
    ),
}


def losses(length: int = 64, seed: int = 0) -> np.ndarray:
    """A loss curve that falls, rises and stays, in multiples of 1/64: running means are exact."""
    generator = np.random.default_rng(seed)
    steps = np.repeat(generator.choice([-3, 0, 3], size=-(-length // 8)), 8)[:length]
    return ((np.cumsum(steps) + generator.integers(-1, 2, length)) / 64).astype(np.float32)


def scan_scales(tx, values, **extra_args) -> jax.Array:
    """The scale that a bare rule transformation holds after each loss."""

    def body(state, inputs):
        value, extra = inputs
        _, state = tx.update(None, state, value=value, **extra)
        return state, greedylr_jax.get_scale(state)

    return jax.lax.scan(body, tx.init(None), (values, extra_args))[1]


def scales(tx, values, **extra_args) -> np.ndarray:
    """The same, by one compiled program."""
    return np.asarray(jax.jit(functools.partial(scan_scales, tx))(values, **extra_args))
