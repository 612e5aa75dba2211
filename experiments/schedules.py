"""The schedules that a comparison trains with, passive and adaptive, by name.

A passive schedule is an array of rates, an input of the compiled program. An adaptive one multiplies the
updates by a scale of its own; which of them acts is an input, too. So one program serves all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import greedylr_jax
from greedylr_jax.schedules import knee_schedule

PASSIVE: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "polynomial": lambda steps: optax.polynomial_schedule(1.0, 0.0, 2, steps),
    "warmup": lambda steps: optax.linear_schedule(0.0, 1.0, max(1, steps // 10)),  # then constant
    "knee": lambda steps: knee_schedule(1.0, 8 * steps // 10, steps),
}
ADAPTIVE: dict[str, Callable[[int], optax.GradientTransformationExtraArgs]] = {
    # One decision an epoch, as in PyTorch and Keras. Their default patience of 10 epochs would leave it a
    # constant rate in runs as short as these: it halves after 2.
    "plateau": lambda steps_per_epoch: optax.contrib.reduce_on_plateau(
        factor=0.5, patience=2, accumulation_size=steps_per_epoch
    ),
    # The published settings: factor 0.95, patience 10, window 50, at least 10% of the initial rate.
    "GreedyLR": lambda steps_per_epoch: greedylr_jax.greedy_lr(),
}
# Rules that keep their own rates, from an optimizer built with rate 1, the initial rate and the steps.
OWN_RATES: dict[str, Callable[[Any, jax.Array, int], optax.GradientTransformationExtraArgs]] = {
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
    "polling": lambda optimizer, rate, steps: optax.chain(
        optimizer,
        optax.scale(rate),
        greedylr_jax.factor_polling((8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)),
    ),
}
NEEDS_SUPERBATCH = ("LRTuner",)
SCHEDULES = (*PASSIVE, *ADAPTIVE)
COMPARED = ("constant", "linear", "cosine", "plateau", "GreedyLR")  # by the command compare


class ScheduleInputs(NamedTuple):
    """What tells a compiled run which schedule to follow."""

    rates: np.ndarray  # shape=(steps,), dtype=float32; the passive part
    adaptive: np.ndarray  # shape=(), dtype=int32; 0: none, else 1 + index into ADAPTIVE


def schedule_inputs(name: str, learning_rate: float, steps: int) -> ScheduleInputs:
    """The inputs of a run of ``steps`` steps that starts at ``learning_rate`` and follows ``name``."""
    shape = PASSIVE.get(name, PASSIVE["constant"])(steps)
    fractions = np.array([shape(step) for step in range(steps)], np.float32)
    adaptive = 1 + list(ADAPTIVE).index(name) if name in ADAPTIVE else 0
    return ScheduleInputs(np.float32(learning_rate) * fractions, np.int32(adaptive))


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


def adaptive_scale(index: jax.Array, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The adaptive part of a run: the schedule that :class:`ScheduleInputs` names, or none."""
    adaptive = [make(steps_per_epoch) for make in ADAPTIVE.values()]
    return switch(index, [optax.identity(), *adaptive])
