"""The schedules that experiments train with, passive and adaptive, by name.

A passive schedule is an array of rates, an input of the compiled program. An adaptive one multiplies the
updates by a scale of its own; which of them acts, and with which settings, is an input, too. So one program
serves all. Rules that keep their own rates have a program each, which serves all initial rates.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import greedylr_jax
import greedylr_jax.arc
from experiments.errors import UsageError
from greedylr_jax.schedules import knee_schedule


def _inverse_sqrt(warmup: int) -> optax.Schedule:
    """Up to 1 in ``warmup`` steps, then down as the inverse square root of the step ("Attention Is All You
    Need").
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32) + 1
        return jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    return schedule


PASSIVE: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "polynomial": lambda steps: optax.polynomial_schedule(1.0, 0.0, 2, steps),
    "step": lambda steps: optax.piecewise_constant_schedule(1.0, {steps // 2: 0.1, 3 * steps // 4: 0.1}),
    "warmup": lambda steps: optax.linear_schedule(0.0, 1.0, max(1, steps // 10)),  # then constant
    "inverse-sqrt": lambda steps: _inverse_sqrt(max(1, steps // 10)),
    "knee": lambda steps: knee_schedule(1.0, 8 * steps // 10, steps),
    # The next three as in Section 4 of the ARC paper. Two periods, the second twice as long as the first.
    "cyclic-cosine": lambda steps: optax.sgdr_schedule(
        [
            {
                "init_value": 1.0,
                "peak_value": 1.0,
                "warmup_steps": 0,
                "decay_steps": period,
                "end_value": 0.02,
            }
            for period in (steps // 3, steps - steps // 3)
        ]
    ),
    # By 0.9 an epoch in thirty of them.
    "exponential": lambda steps: optax.exponential_decay(1.0, max(1, steps // 30), 0.9, staircase=True),
    # Superconvergence; the rate that it is given is its greatest.
    "one-cycle": lambda steps: optax.linear_onecycle_schedule(steps, 1.0),
}
# The published settings are the defaults: factor 0.95, patience 10, window 50, at least 10% of the initial
# rate.
_TRACED = ("factor", "patience", "threshold", "cooldown", "warmup", "min_scale", "max_scale")
GREEDY_DEFAULTS: Mapping[str, float] = {
    name: inspect.signature(greedylr_jax.greedy_lr).parameters[name].default for name in _TRACED
}
ADAPTIVE: dict[str, Callable[[int, Mapping[str, jax.Array]], optax.GradientTransformationExtraArgs]] = {
    # One decision an epoch, as in PyTorch and Keras. Their default patience of 10 epochs would leave it a
    # constant rate in runs as short as these: it halves after 2.
    "plateau": lambda steps_per_epoch, settings: optax.contrib.reduce_on_plateau(
        factor=0.5, patience=2, accumulation_size=steps_per_epoch
    ),
    "GreedyLR": lambda steps_per_epoch, settings: greedylr_jax.greedy_lr(**settings),
}
# From an optimizer built with rate 1, the initial rate and the steps, and perhaps settings.
OwnRates = Callable[..., optax.GradientTransformationExtraArgs]


def _arc(
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    steps: int,
    *,
    weights: str | None = None,
    decisions: int = 10,
    validation: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """ARC, with the weights in a file or those that ship."""
    try:
        loaded = greedylr_jax.arc.load_weights(weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read ARC's weights {weights!r}: {error}") from error
    rule = greedylr_jax.arc.arc(
        loaded,
        steps_per_cycle=max(2, steps // decisions),
        validation=validation,
    )
    return greedylr_jax.chain(optimizer, optax.scale(rate), rule)


RULES: dict[str, OwnRates] = {
    "hypergradient": lambda optimizer, rate, steps: greedylr_jax.hypergradient(
        optimizer, rate, 0.02, mode="multiplicative"
    ),
    # The paper's advice: explore for a quarter of the training, epsilon threshold of the size of the rate.
    "LRTuner": lambda optimizer, rate, steps: greedylr_jax.lr_tuner(
        optimizer,
        rate,
        explore_steps=steps // 4,
        recompute_every=max(1, steps // 20),
        epsilon_threshold=(2 * rate) ** 3,
    ),
    "ARC": _arc,
    "auto": lambda optimizer, rate, steps: greedylr_jax.auto_lr(optimizer, rate, total_steps=steps),
    **{
        name: lambda optimizer, rate, steps, factors=factors: optax.chain(
            optimizer, optax.scale(rate), greedylr_jax.factor_polling(factors)
        )
        for name, factors in (
            ("polling-3", (2.0, 1.0, 0.5)),
            ("polling-5", (4.0, 2.0, 1.0, 0.5, 0.25)),
            ("polling-5-4batches", (4.0, 2.0, 1.0, 0.5, 0.25)),
            ("polling-5-16batches", (4.0, 2.0, 1.0, 0.5, 0.25)),
            ("polling", (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)),
        )
    },
}
# Peers from Optax, with its defaults. Those that are optimizers themselves leave the given one alone.
PEERS: dict[str, OwnRates] = {
    "schedule-free": lambda optimizer, rate, steps: optax.contrib.schedule_free_adamw(rate),
    "prodigy": lambda optimizer, rate, steps: optax.contrib.prodigy(rate),
    # The given rate is where their own estimate starts.
    "prodigy-guess": lambda optimizer, rate, steps: optax.contrib.prodigy(1.0, estim_lr0=rate),
    "dog-guess": lambda optimizer, rate, steps: optax.contrib.dog(1.0, ("learning_rate", rate)),
    "mechanic": lambda optimizer, rate, steps: optax.contrib.mechanize(
        optax.chain(optimizer, optax.scale(rate))
    ),
    "momo": lambda optimizer, rate, steps: optax.contrib.momo_adam(rate),
    "Armijo": lambda optimizer, rate, steps: optax.chain(
        optimizer,
        optax.scale(rate),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
    ),
}
OWN_RATES = RULES | PEERS
# Batches that a rule's value_fn is the mean over; 1, that of the step itself, for all others.
SUPERBATCHES = {"LRTuner": 10, "polling-5-4batches": 4, "polling-5-16batches": 16}
VALIDATED = ("ARC",)  # rules that look at validation losses, where there are any
COMPARED = ("constant", "linear", "cosine", "plateau", "GreedyLR")  # by the command compare


class ScheduleInputs(NamedTuple):
    """What tells a compiled run which schedule to follow."""

    rates: np.ndarray  # shape=(steps,), dtype=float32; the passive part
    adaptive: np.ndarray  # shape=(), dtype=int32; 0: none, else 1 + index into ADAPTIVE
    settings: dict[str, np.ndarray]  # each of shape=(); GreedyLR's


@functools.cache  # a sweep asks for each of its runs, and ARC's settings name a file
def parse(name: str) -> tuple[str, Mapping[str, Any]]:
    """A schedule's name, and settings that differ from the defaults; shared, so not to be changed.

    Raises:
      UsageError: if there is no such schedule or setting.

    Examples:
      >>> parse("cosine")
      ('cosine', {})
      >>> parse("GreedyLR(factor=0.8, patience=5)")
      ('GreedyLR', {'factor': 0.8, 'patience': 5})
    """
    base, bracket, rest = name.partition("(")
    if base not in (*PASSIVE, *ADAPTIVE, *OWN_RATES):
        raise UsageError(
            f"unknown schedule {name!r}; there are: {', '.join((*PASSIVE, *ADAPTIVE, *OWN_RATES))}"
        )
    if not bracket:
        return base, {}
    settings = {}
    try:
        for keyword in ast.parse(f"f({rest.removesuffix(')')})", mode="eval").body.keywords:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"cannot read the settings of schedule {name!r}") from error
    allowed = _settings_of(base)
    if unknown := settings.keys() - allowed:
        raise UsageError(
            f"schedule {name!r} has unknown settings {sorted(unknown)}; there are: "
            f"{', '.join(allowed) or 'none'}"
        )
    # Values out of range are refused here, by name.
    if base == "GreedyLR":
        greedylr_jax.greedy_lr(**settings)
    else:
        OWN_RATES[base](optax.sgd(1.0), 1.0, 100, **settings)
    return base, settings


def arc_with(weights: str | None, *, decisions: int, validation: bool = True) -> str:
    """The name of ARC with settings.

    Examples:
      >>> arc_with(None, decisions=10)
      'ARC(weights=None, decisions=10, validation=True)'
    """
    return f"ARC(weights={weights!r}, decisions={decisions}, validation={validation})"


def _settings_of(base: str) -> tuple[str, ...]:
    """What may stand in brackets behind the name of a schedule."""
    if base == "GreedyLR":
        return tuple(GREEDY_DEFAULTS)
    if base not in OWN_RATES:
        return ()
    return tuple(inspect.signature(OWN_RATES[base]).parameters)[3:]


def schedule_inputs(name: str, learning_rate: float, steps: int) -> ScheduleInputs:
    """The inputs of a run of ``steps`` steps that starts at ``learning_rate`` and follows ``name``."""
    base, settings = parse(name)
    settings = settings if base == "GreedyLR" else {}
    adaptive = 1 + list(ADAPTIVE).index(base) if base in ADAPTIVE else 0
    traced = {
        key: np.asarray(settings.get(key, default), np.int32 if isinstance(default, int) else np.float32)
        for key, default in GREEDY_DEFAULTS.items()
    }
    return ScheduleInputs(np.float32(learning_rate) * _fractions(base, steps), np.int32(adaptive), traced)


@functools.cache
def _fractions(name: str, steps: int) -> np.ndarray:
    """The passive part of a schedule over the initial rate, shape (steps,); shared, so not to be changed."""
    shape = PASSIVE.get(name, PASSIVE["constant"])(steps)
    return np.array(jax.vmap(shape)(np.arange(steps)), np.float32)


def switch(
    index: jax.Array, transforms: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies ``transforms[index]``, for an index that the program computes.

    It keeps the states of all of them, and changes that of the chosen one only.
    """
    transforms = [optax.with_extra_args_support(transform) for transform in transforms]

    def init_fn(params: optax.Params) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update_fn(updates, states, params=None, **extra_args):
        def branch(position: int) -> Callable[..., Any]:
            def apply(updates, states):
                updates, state = transforms[position].update(updates, states[position], params, **extra_args)
                return updates, (*states[:position], state, *states[position + 1 :])

            return apply

        return jax.lax.switch(index, [branch(i) for i in range(len(transforms))], updates, states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adaptive_scale(inputs: ScheduleInputs, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The adaptive part of a run: the schedule that :class:`ScheduleInputs` names, or none."""
    adaptive = [make(steps_per_epoch, inputs.settings) for make in ADAPTIVE.values()]
    return switch(inputs.adaptive, [optax.identity(), *adaptive])
