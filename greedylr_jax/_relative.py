"""Updates measured against the parameters: rms(update) = relative step * rms(initial parameters).

An optimizer's learning rate has the unit of the parameters per step, so a good one has to be found for every
network. Relative to the size of the parameters it is a dimensionless number, which differs little between
networks.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _observe, _rule

_ZERO_RMS = 0.1  # assumed of parameters that are all zero, in their unit: a layer with 100 inputs has it


class ScaleToParametersState(NamedTuple):
    """State of :func:`scale_to_parameters`."""

    rate: _rule.ComputedRateState  # multiplier of the last update that was not zero; with labels one for each
    step: jax.Array  # shape=(), dtype=int32; number of updates
    squares: jax.Array  # shape=(leaves,), dtype=float; sum of squares of each initial parameter


def scale_to_parameters(
    relative_step: ArrayLike | optax.Schedule,
    *,
    param_labels: Any | Callable[[optax.Params], Any] = None,
    shard_axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates to a root mean square of ``relative_step`` times that of the initial parameters.

    The root mean square is taken over all floating-point and complex parameters together, so the updates keep
    their direction. Put it after an optimizer, whose learning rate then has no effect. Differences from
    ``optax.scale_by_trust_ratio`` (LARS and LAMB): that one scales every layer by itself, to the *current*
    norm of its parameters, so that a layer of zeros needs an exception and a growing layer takes growing
    steps; here the scale is global and its reference is constant.

    A leaf whose update is zero everywhere, such as a frozen one, counts in neither root mean square. If all
    remaining parameters were initially zero, the reference is the root mean square of all parameters, or 0.1
    if these are zero as well.

    Args:
      relative_step: rms(update) / rms(initial parameters), >= 0: a number, or a schedule that maps the number
        of earlier updates to it. May be traced. With Adam 0.01 to 0.02 is a good maximum.
      param_labels: None: one root mean square over all parameters. Otherwise one for each label: a pytree of
        strings with the structure of the parameters or a prefix of it, or a function from the parameters to
        one, as in ``optax.partition``.
      shard_axis_name: mapped axis, or axes, over which the *parameters* are sharded inside ``jax.shard_map``;
        sums of squares are summed over it in ``init`` and ``update``, except those of leaves that are
        replicated, provided that ``jax.shard_map`` runs with ``check_vma=True`` (its default); otherwise all
        leaves count as sharded. None where every device has all parameters, as in data-parallel training.

    Returns:
      A ``GradientTransformationExtraArgs``. Updates that are zero stay zero. Updates with an element that is
      not finite, or whose squares overflow float32, become zero; wrap the optimizer with
      ``optax.apply_if_finite`` to protect its state as well. :func:`greedylr_jax.get_learning_rate` reads the
      multiplier of the last update: behind an optimizer with learning rate 1 it is the learning rate.

    Raises:
      ValueError: if ``relative_step`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> schedule = optax.cosine_decay_schedule(0.02, 1000)
      >>> tx = optax.chain(optax.adam(1.0), greedylr_jax.scale_to_parameters(schedule))
      >>> params = {"w": jnp.full(3, 2.0), "b": jnp.zeros(1)}  # of root mean square sqrt(3)
      >>> grads = {"w": jnp.ones(3), "b": jnp.ones(1)}
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> print(updates["w"], updates["b"])  # 0.02 * sqrt(3)
      [-0.03464102 -0.03464102 -0.03464102] [-0.03464102]

    Source: this project; a global form of the trust ratio of Y. You et al., "Large Batch Optimization for
    Deep Learning: Training BERT in 76 minutes", 2020.
    """
    if not callable(relative_step):
        relative_step = _checks.check_real("relative_step", relative_step, low=0.0, high_open=True)

    def init_fn(params: optax.Params) -> ScaleToParametersState:
        names = sorted(set(_labels(param_labels, params)))
        zero = jnp.zeros((), _numerics.default_float_dtype())
        rates = zero if param_labels is None else {name: jnp.array(zero) for name in names}
        squares = jnp.array(_sums_of_squares(jax.tree.leaves(params), shard_axis_name), zero.dtype)
        return ScaleToParametersState(_rule.ComputedRateState(rates), jnp.zeros((), jnp.int32), squares)

    def update_fn(
        updates: optax.Updates,
        state: ScaleToParametersState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleToParametersState]:
        del params, extra_args
        target = relative_step(state.step) if callable(relative_step) else relative_step
        labels = _labels(param_labels, updates)
        leaves, structure = jax.tree.flatten(updates)
        leaves = _opposites(leaves)
        squares = _sums_of_squares(leaves, shard_axis_name)
        sizes = [_number_of_elements(leaf, shard_axis_name) for leaf in leaves]
        old = {_ALL: state.rate.learning_rate} if param_labels is None else state.rate.learning_rate
        rates = {}
        for name, last in old.items():
            members = [index for index, label in enumerate(labels) if label == name]
            norm, reference = _norms(squares, state.squares, sizes, members)
            wanted = jnp.asarray(target, norm.dtype) * reference / _numerics.where(norm > 0, norm, 1)
            rate = _numerics.where(jnp.isfinite(norm), wanted, 0)
            rates[name] = _numerics.where(norm == 0, last, rate) if members else last
        scaled = [_scale(leaf, -rates[label]) for leaf, label in zip(leaves, labels, strict=True)]
        rate = _rule.ComputedRateState(rates[_ALL] if param_labels is None else rates)
        step = jnp.minimum(state.step, _checks.INT32_MAX - 1) + 1
        return structure.unflatten(scaled), ScaleToParametersState(rate, step, state.squares)

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))


_ALL = ""  # the label of every leaf without `param_labels`


def _labels(param_labels: Any, params: optax.Params) -> list[str]:
    """The label of each leaf."""
    if param_labels is None:
        return [_ALL] * len(jax.tree.leaves(params))
    labels = param_labels(params) if callable(param_labels) else param_labels
    return jax.tree.leaves(
        jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    )


def _opposites(leaves: list[Any]) -> list[Any]:
    """The negative of each leaf, for XLA: the norm and the scaled updates then read one array in memory.

    The sign cancels the factor of -1 of an optimizer with learning rate 1, which XLA otherwise computes
    twice, and on a CPU all that precedes it, too. It is a product with -1, as XLA does not cancel a negation.
    """
    return _numerics.computed_once([-1 * leaf if _numerics.is_inexact(leaf) else leaf for leaf in leaves])


def _sums_of_squares(leaves: list[Any], axis_name: Hashable | None) -> list[jax.Array]:
    """The sum of squares of each leaf; 0 of leaves of integers."""
    dtype = _numerics.default_float_dtype()

    def total(leaf: Any) -> jax.Array:
        if not _numerics.is_inexact(leaf):
            return jnp.zeros((), dtype)
        leaf = jnp.asarray(leaf)
        wide = leaf.astype(jnp.promote_types(leaf.dtype, dtype))
        squares = (wide * jnp.conj(wide)).real if jnp.iscomplexobj(wide) else wide * wide
        return jnp.sum(squares).astype(dtype)

    return _observe.sum_over_devices([total(leaf) for leaf in leaves], axis_name)


def _number_of_elements(leaf: Any, axis_name: Hashable | None) -> int:
    """On all devices together."""
    axes = _observe.sharded_axes(leaf, axis_name)
    return np.size(leaf) * (jax.lax.psum(1, axes) if axes else 1)


def _norms(
    squares: list[jax.Array], initial: jax.Array, sizes: list[int], members: list[int]
) -> tuple[jax.Array, jax.Array]:
    """The norm of the updates of a group of leaves, and the norm that their initial parameters had."""
    zero = jnp.zeros((), initial.dtype)
    total, reference, elements, everything = zero, zero, zero, zero
    for index in members:
        moves = squares[index] > 0
        total += squares[index]
        everything += initial[index]
        reference += _numerics.where(moves, initial[index], 0)
        elements += _numerics.where(moves, jnp.asarray(float(sizes[index]), zero.dtype), 0)
    mean_square = everything / max(sum(sizes[index] for index in members), 1)
    mean_square = _numerics.where(everything > 0, mean_square, _ZERO_RMS**2)
    reference = _numerics.where(reference > 0, reference, mean_square * elements)
    return jnp.sqrt(total), jnp.sqrt(reference)


def _scale(leaf: Any, rate: jax.Array) -> jax.Array:
    """The leaf times the rate; zero where the rate is zero, whatever the leaf holds."""
    scaled = _numerics.scale_leaf(leaf, rate)
    if not _numerics.is_inexact(scaled):
        return scaled
    return jax.lax.select(rate != 0, scaled, jnp.zeros_like(scaled))
