"""Reading the loss of a step and its companions from the extra arguments of ``update``.

Every rule and wrapper reads ``value``, ``has_value`` and ``axis_name`` with :func:`read`, and takes the mean
of ``every`` losses with :func:`accumulate`.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics

T = TypeVar("T")

_WITHOUT_VALUE = (
    "If the training loop calls update for you: greedylr_jax.value_from(tx, 'loss') takes the loss from "
    "another argument, greedylr_jax.value_from_observe(tx) from a callback that calls "
    "greedylr_jax.observe(opt_state, loss), and greedylr_jax.value_from_slot(tx) from the gradient of an "
    "extra parameter."
)


class Observation(NamedTuple):
    """The loss of one step."""

    value: jax.Array  # shape=(), dtype=float; averaged over devices; a placeholder where there is no loss
    has_value: np.bool_ | jax.Array  # shape=(), dtype=bool; a NumPy scalar where it is known at trace time

    @property
    def is_absent(self) -> bool:
        """Whether it is known at trace time that the step has no loss."""
        return _checks.is_known_false(self.has_value)

    @property
    def is_present(self) -> bool:
        """Whether it is known at trace time that the step has a loss."""
        return not _checks.is_traced(self.has_value) and bool(self.has_value)


def read(
    rule_name: str,
    value: ArrayLike | None,
    has_value: ArrayLike | None,
    dtype: Any,
    axis_name: Hashable | None = None,
    *,
    default: float | None = None,
) -> Observation:
    """Reads the loss of a step from the arguments of ``update``.

    Args:
      rule_name: what error messages call the rule.
      value: the loss, a real scalar. Ignored where ``has_value`` is False at trace time.
      has_value: whether the step brings a loss, a Python bool or a boolean scalar array; None: it does.
      dtype: dtype of the loss that is returned.
      axis_name: mapped axis, or axes, over which the loss is averaged, over the devices that have one.
      default: the loss of a step without ``value``; None: ``value`` is required.

    Returns:
      An :class:`Observation`, the same on all devices of ``axis_name``.

    Raises:
      TypeError: if ``value`` is missing, or not a real number.
      ValueError: if ``value`` or ``has_value`` is not a scalar.
    """
    observed = _check_has_value(rule_name, has_value)
    if _checks.is_known_false(observed):
        return Observation(jnp.full((), 0.0 if default is None else default, dtype), observed)
    if value is None and default is not None:
        return Observation(jnp.full((), default, dtype), observed)
    loss = check_loss(rule_name, value).astype(dtype)
    if axis_name is not None and _checks.is_traced(observed):
        total, count = jax.lax.psum((jnp.where(observed, loss, 0), observed.astype(loss.dtype)), axis_name)
        return Observation(total / jnp.maximum(count, 1), count > 0)
    return Observation(average(loss, axis_name), observed)


def read_optional(
    rule_name: str, name: str, value: ArrayLike | None, dtype: Any, axis_name: Hashable | None = None
) -> jax.Array | None:
    """Reads a further scalar, such as ``validation_value``, which a step may leave out."""
    if value is None:
        return None
    return average(check_loss(rule_name, value, name).astype(dtype), axis_name)


def accumulate(
    value_sum: jax.Array, value_count: jax.Array, observation: Observation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the loss of a step, if it has one, to a running sum. Returns the sum, the count and the mean."""
    if observation.is_present:
        value_sum, value_count = value_sum + observation.value, value_count + 1
    else:
        added = _numerics.where(observation.has_value, value_sum + observation.value, value_sum)
        value_sum, value_count = added, value_count + observation.has_value.astype(jnp.int32)
    return value_sum, value_count, value_sum / jnp.maximum(value_count, 1).astype(value_sum.dtype)


def average(losses: T, axis_name: Hashable | None) -> T:
    """The mean over the devices of a mapped axis; the losses as they are where there is no axis."""
    return losses if axis_name is None else jax.lax.pmean(losses, axis_name)


def any_device(condition: jax.Array, axis_name: Hashable | None) -> jax.Array:
    """Whether the condition is true on any device of a mapped axis; the condition itself without an axis."""
    return condition if axis_name is None else jax.lax.pmax(condition.astype(jnp.int32), axis_name) > 0


def sum_over_devices(terms: list[jax.Array], axis_name: Hashable | None) -> list[jax.Array]:
    """Each term summed over those of the mapped axes along which it varies, see :func:`sharded_axes`."""
    by_axes: dict[tuple[Hashable, ...], list[int]] = {}
    for index, term in enumerate(terms):
        by_axes.setdefault(sharded_axes(term, axis_name), []).append(index)
    sums = dict(enumerate(terms))
    for axes, indices in by_axes.items():
        if axes:
            sums |= zip(indices, jax.lax.psum([terms[index] for index in indices], axes), strict=True)
    return list(sums.values())


def sharded_axes(array: jax.Array, axis_name: Hashable | None) -> tuple[Hashable, ...]:
    """Those of the mapped axes along which devices hold different values.

    Known from the type of the array; inside ``jax.shard_map`` with ``check_vma=False`` all of them.
    """
    if axis_name is None:
        return ()
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    # Empty with check_vma=False, as is the type of every array then.
    tracked = _numerics.varying_axes(jax.lax.axis_index(axes))
    return tuple(axis for axis in axes if not tracked or axis in _numerics.varying_axes(array))


def _check_has_value(rule_name: str, has_value: ArrayLike | None) -> np.bool_ | jax.Array:
    if has_value is None:
        return np.bool_(True)
    if jnp.shape(has_value) != ():
        raise ValueError(
            f"{rule_name}: has_value must be a Python bool or a boolean scalar array, got shape "
            f"{jnp.shape(has_value)}."
        )
    return jnp.asarray(has_value, bool) if _checks.is_traced(has_value) else np.bool_(has_value)


def check_loss(
    rule_name: str,
    value: ArrayLike | None,
    name: str = "value",
    *,
    right_call: str | None = None,
    batch_shape: tuple[int, ...] = (),
) -> jax.Array:
    """Returns the loss as a real array, or raises an error that shows the right call.

    Args:
      rule_name: what error messages call the rule.
      value: the loss.
      name: the argument's name in ``update``.
      right_call: the call that error messages show; None: that of ``update``.
      batch_shape: a further shape that is allowed, besides that of a scalar.
    """
    right_call = right_call or f"tx.update(grads, opt_state, params, {name}=loss)"
    if value is None:
        raise TypeError(
            f"{rule_name} needs the loss of this step: call {right_call}, where loss is the scalar "
            "that you differentiate (jax.value_and_grad returns it). For a step without a new loss "
            f"pass has_value=False. {_WITHOUT_VALUE}"
        )
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got {value!r}."
        ) from error
    if array.shape not in ((), batch_shape):
        raise ValueError(
            f"{rule_name}: {name} must be a scalar loss, got shape {array.shape}. Reduce it first: "
            f"{'jnp.mean(losses)'.join(right_call.rsplit('loss', 1))}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{rule_name}: {name} must be a real scalar loss, as in {right_call}, got dtype {array.dtype}."
        )
    return array
