"""Schedules that the papers use as baselines and that Optax does not provide."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedylr_jax import _checks


def knee_schedule(
    init_value: float, explore_steps: int, total_steps: int, *, warmup_steps: int = 0, end_value: float = 0.0
) -> optax.Schedule:
    """Explore-exploit schedule: holds the rate, then decreases it linearly.

    Args:
      init_value: learning rate of the explore phase, > 0.
      explore_steps: number of steps of the explore phase, including the warm-up; an integer in
        [0, ``total_steps``].
      total_steps: number of steps after which the rate is ``end_value``, an integer >= 1.
      warmup_steps: number of steps of a linear warm-up from 0, an integer in [0, ``explore_steps``].
      end_value: final learning rate, in [0, ``init_value``].

    Returns:
      A function from the step to the learning rate.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> from greedylr_jax.schedules import knee_schedule
      >>> schedule = knee_schedule(0.5, explore_steps=100, total_steps=200)
      >>> [float(schedule(step)) for step in (0, 100, 150, 200)]
      [0.5, 0.5, 0.25, 0.0]

    Source: N. Iyer et al., "Wide-minima Density Hypothesis and the Explore-Exploit Learning Rate Schedule"
    (2020), cited in Section 2.1 of the LRTuner paper.
    """
    value = _checks.check_real("init_value", init_value, low=0.0, low_open=True, high_open=True)
    _checks.check_integer("total_steps", total_steps, low=1)
    _checks.check_integer("explore_steps", explore_steps, high=total_steps)
    _checks.check_integer("warmup_steps", warmup_steps, high=explore_steps)
    end = _checks.check_real("end_value", end_value, low=0.0, high=value)
    pieces = [
        optax.linear_schedule(0.0, value, warmup_steps) if warmup_steps else optax.constant_schedule(value),
        optax.constant_schedule(value),
        optax.linear_schedule(value, end, total_steps - explore_steps)
        if total_steps > explore_steps
        else optax.constant_schedule(end),
    ]
    return optax.join_schedules(pieces, [warmup_steps, explore_steps])


def epoch_step_schedule(
    init_value: float, epochs: Sequence[int], steps_per_epoch: int, *, factor: float = 0.1
) -> optax.Schedule:
    """Step decay in epochs: multiplies the rate by ``factor`` at the start of each epoch in ``epochs``.

    Args:
      init_value: initial learning rate, > 0.
      epochs: epochs, counted from 0, at whose first step the rate decreases; increasing integers >= 1.
      steps_per_epoch: number of steps per epoch, an integer >= 1.
      factor: multiplies the rate; in (0, 1].

    Returns:
      A function from the step to the learning rate.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      The baseline in Table 1 of LRTuner, 30 epochs each at 0.1, 0.01 and 0.001:

      >>> from greedylr_jax.schedules import epoch_step_schedule
      >>> schedule = epoch_step_schedule(0.1, [30, 60], steps_per_epoch=5000)
      >>> [f"{schedule(epoch * 5000):.3f}" for epoch in (0, 29, 30, 60, 89)]
      ['0.100', '0.100', '0.010', '0.001', '0.001']

    Source: LRTuner, Section 3.1.
    """
    value = _checks.check_real("init_value", init_value, low=0.0, low_open=True, high_open=True)
    _checks.check_integer("steps_per_epoch", steps_per_epoch, low=1)
    _checks.check_real("factor", factor, low=0.0, high=1.0, low_open=True)
    for epoch in epochs:
        _checks.check_integer("epochs", epoch, low=1)
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"epochs must be increasing, got {list(epochs)!r}.")
    boundaries = np.array([epoch * steps_per_epoch for epoch in epochs])

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        passed = jnp.sum(jnp.asarray(count)[..., None] >= boundaries, axis=-1)
        return value * jnp.asarray(factor, jnp.result_type(float)) ** passed

    return schedule
