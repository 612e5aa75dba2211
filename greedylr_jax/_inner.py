"""Optimizers that a rule with its own learning rate wraps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from greedylr_jax import _checks


def as_direction(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose results point along the gradient and not against it.

    Rules that keep the rate themselves need a direction without one, such as ``optax.scale_by_adam()``. An
    optimizer built with rate 1, such as ``optax.adam(1.0)``, is the negative of that and is turned around
    here; which of the two it is shows in its answer to a gradient of 1.
    """
    inner = optax.with_extra_args_support(inner)
    answer = _answer_to_one(inner)
    if answer is None or answer >= 0:
        return inner

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        steps, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.negative, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _answer_to_one(inner: optax.GradientTransformationExtraArgs) -> float | None:
    """What comes of a gradient of 1 at the parameter 0; None where that cannot be known."""
    try:
        with jax.ensure_compile_time_eval():
            one, zero = jnp.ones(1), jnp.zeros(1)
            answer, _ = inner.update(one, inner.init(zero), zero)
            return None if _checks.is_traced(answer) else float(answer[0])
    except Exception:  # a transformation for parameters of a certain structure, or with other arguments
        return None
