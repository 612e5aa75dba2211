"""Reading the loss and its companions from the extra arguments of ``update``."""

import functools
import inspect
from collections.abc import Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks

T = TypeVar("T")


def average(losses: T, axis_name: Hashable | None) -> T:
    """The mean over the devices of a mapped axis; what is given where there is none."""
    return losses if axis_name is None else jax.lax.pmean(losses, axis_name)


def read_loss(
    rule_name: str,
    value: ArrayLike | None,
    has_value: ArrayLike | None,
    dtype: jnp.dtype,
    axis_name: Hashable | None,
) -> tuple[jax.Array, jax.Array]:
    """The loss of a step, averaged over devices, and whether there is one: if not, the loss is any number."""
    if value is None and _checks.is_known_false(has_value):
        value = 0.0
    loss = average(check_loss(rule_name, value).astype(dtype), axis_name)
    return loss, jnp.asarray(True if has_value is None else has_value, bool)


def check_loss(rule_name: str, value: ArrayLike | None, name: str = "value") -> jax.Array:
    """Returns the loss as a real scalar array, or raises an error that shows the right call."""
    right_call = f"tx.update(grads, opt_state, params, {name}=loss)"
    if value is None:
        raise TypeError(
            f"{rule_name} needs the loss of this step: call {right_call}, where loss is the scalar "
            "that you differentiate (jax.value_and_grad returns it). For a step without a new loss "
            "pass has_value=False."
        )
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got {value!r}."
        ) from error
    if array.shape != ():
        raise ValueError(
            f"{rule_name}: {name} must be a scalar loss, got shape {array.shape}. Reduce it first: "
            f"{right_call.replace('loss', 'jnp.mean(losses)')}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got dtype {array.dtype}."
        )
    return array


def bind_extra_args(tx: optax.GradientTransformation, **extra_args: Any) -> optax.GradientTransformation:
    """The same transformation, whose ``update`` gets these extra arguments if it takes any.

    The type does not tell: ``optax.MultiSteps`` takes them without being of a type that says so.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    takes_them = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    update = functools.partial(tx.update, **extra_args) if takes_them else tx.update
    return optax.GradientTransformation(tx.init, update)
