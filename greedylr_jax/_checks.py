"""Argument checks shared by all rules.

Hyperparameters may be Python numbers, NumPy or JAX scalars, or tracers. Each check returns a known value as
a Python number, so that it becomes a literal of the compiled program and can decide what is compiled. It
returns a tracer unchanged: its bounds cannot be checked, so every rule must be well defined for any value.
"""

import math
import numbers
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.typing import ArrayLike

INT32_MAX = int(np.iinfo(np.int32).max)


def is_traced(value: Any) -> bool:
    """Whether ``value`` is known only when the compiled program runs."""
    return isinstance(value, core.Tracer)


def is_known_false(condition: Any) -> bool:
    """Whether a flag such as ``has_value`` is given and is False, known before the program runs."""
    return condition is not None and not is_traced(condition) and not condition


def _scalar(name: str, value: ArrayLike, kinds: tuple[Any, ...], expected: str) -> Any:
    """Returns ``value`` as a Python number, or unchanged if it is a tracer."""
    numeric = isinstance(value, (numbers.Real, np.ndarray, np.generic, jax.Array))
    if not numeric or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {jnp.shape(value)}. To run many settings at once, "
            "build the transformation inside the function that jax.vmap maps."
        )
    if not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return value if is_traced(value) else np.asarray(value).item()


def check_real(
    name: str,
    value: ArrayLike,
    *,
    low: float | jax.Array = -math.inf,
    high: float | jax.Array = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float | jax.Array:
    """Returns a real scalar between ``low`` and ``high``, or raises ``ValueError``. Bounds may be traced."""
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    from_, to = ("?" if is_traced(bound) else f"{bound:g}" for bound in (low, high))
    expected = f"a number in {left}{from_}, {to}{right}"
    number = _scalar(name, value, (jnp.floating, jnp.integer), expected)
    low, high = -math.inf if is_traced(low) else low, math.inf if is_traced(high) else high
    if is_traced(number):
        return number
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):  # also catches NaN
        raise ValueError(f"{name} must be {expected}, got {number!r}.")
    return number


def check_integer(name: str, value: ArrayLike, *, low: int = 0, high: int = INT32_MAX) -> int | jax.Array:
    """Returns an integer scalar between ``low`` and ``high``, or raises ``ValueError``."""
    expected = f"an integer in [{low}, {high}]"
    number = _scalar(name, value, (jnp.integer,), expected)
    if not is_traced(number) and not low <= number <= high:
        raise ValueError(f"{name} must be {expected}, got {number!r}.")
    return number


def check_static_integer(name: str, value: Any, *, low: int = 1) -> int:
    """As :func:`check_integer`, for a value that fixes a shape and so cannot be traced."""
    if is_traced(value):
        raise ValueError(
            f"{name} fixes the shape of the state and must be a Python integer, got a traced value."
        )
    return int(check_integer(name, value, low=low))


def check_bool(name: str, value: Any) -> bool:
    """Returns ``value`` if it is a Python bool, which is static, or raises ``ValueError``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, known before tracing, got {value!r}.")
    return value


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Returns ``value`` if it is one of ``allowed``, or raises ``ValueError``."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    return value


def check_precision(value: Any) -> str | None:
    """Returns a precision of matrix products, or raises ``ValueError``."""
    return None if value is None else check_choice("matmul_precision", value, ("default", "high", "highest"))


def check_leading_axis(name: str, tree: Any, what: str, *, low: int = 1) -> int:
    """Returns the length of the leading axis that all arrays of a pytree share, or raises ``ValueError``."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or max(sizes) < (low,):
        raise ValueError(
            f"{name} must hold arrays with one leading axis of equal length >= {low}, the number of {what}; "
            f"got leading axes {sorted(sizes)}."
        )
    ((length,),) = sizes
    return length


def check_initial(
    names: tuple[str, str, str], minimum: ArrayLike, initial: ArrayLike, maximum: ArrayLike
) -> float | jax.Array:
    """Returns an initial value in (0, inf) within its bounds, or raises ``ValueError``.

    ``names`` are the user's for the minimum, the initial value and the maximum.
    """
    min_name, name, max_name = names
    initial = check_real(name, initial, low=0.0, low_open=True, high_open=True)
    check_order(min_name, minimum, max_name, maximum)
    check_order(min_name, minimum, name, initial)
    check_order(name, initial, max_name, maximum)
    return initial


def check_order(low_name: str, low: ArrayLike, high_name: str, high: ArrayLike) -> None:
    """Raises ``ValueError`` if both values are known and ``low`` exceeds ``high``."""
    if not is_traced(low) and not is_traced(high) and np.asarray(low) > np.asarray(high):
        raise ValueError(
            f"{low_name} must not exceed {high_name}, got {low_name}={low!r} and {high_name}={high!r}."
        )
