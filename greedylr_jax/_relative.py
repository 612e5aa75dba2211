"""Updates measured against the parameters: rms(update) = relative step * rms(initial parameters).

An optimizer's learning rate has the unit of the parameters per step, so a good one has to be found for every
network. Relative to the size of the parameters it is a dimensionless number, which differs little between
networks.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _rule

_ZERO_RMS = 0.1  # assumed of parameters that are all zero, in their unit: a layer with 100 inputs has it


class ScaleToParametersState(NamedTuple):
    """State of :func:`scale_to_parameters`."""

    rate: _rule.RateState  # multiplier of the last update that was not zero; with labels one for each
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
        sums of squares are summed over it in ``init`` and ``update``. None where every device has all
        parameters, as in data-parallel training.

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
        squares = _sums_of_squares(params, shard_axis_name)
        return ScaleToParametersState(_rule.RateState(rates), jnp.zeros((), jnp.int32), squares)

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
        sizes = np.array([np.size(leaf) for leaf in leaves], float)
        squares = _sums_of_squares(updates, shard_axis_name)

        def rate(last: jax.Array, name: str) -> jax.Array:
            member = np.array([label == name for label in labels], bool)
            norm, reference = _norms(squares, state.squares, member, sizes)
            wanted = jnp.asarray(target, norm.dtype) * reference / jnp.where(norm > 0, norm, 1)
            return jnp.where(norm == 0, last, jnp.where(jnp.isfinite(norm), wanted, 0))

        rates = state.rate.learning_rate
        by_label = {_ALL: rates} if param_labels is None else rates
        by_label = {name: rate(last, name) for name, last in by_label.items()}
        # Where an element is not finite the rate is 0, but 0 times infinity is NaN.
        scaled = [_scale(leaf, by_label[label]) for leaf, label in zip(leaves, labels, strict=True)]
        rates = by_label[_ALL] if param_labels is None else by_label
        step = optax.safe_increment(state.step)
        return structure.unflatten(scaled), ScaleToParametersState(
            _rule.RateState(rates), step, state.squares
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_ALL = ""  # the label of every leaf without `param_labels`


def _labels(param_labels: Any, params: optax.Params) -> list[str]:
    """The label of each leaf."""
    if param_labels is None:
        return [_ALL] * len(jax.tree.leaves(params))
    labels = param_labels(params) if callable(param_labels) else param_labels
    return jax.tree.leaves(
        jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    )


def _sums_of_squares(tree: optax.Params, axis_name: Hashable | None) -> jax.Array:
    """The sum of squares of each leaf, of shape (leaves,); 0 of leaves that hold no numbers to train."""
    dtype = _numerics.default_float_dtype()

    def total(leaf: Any) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return jnp.zeros((), dtype)
        wide = jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), dtype))
        return jnp.sum((wide * jnp.conj(wide)).real).astype(dtype)

    sums = jnp.array([total(leaf) for leaf in jax.tree.leaves(tree)], dtype)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def _norms(
    squares: jax.Array, initial: jax.Array, member: np.ndarray, sizes: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The norm of the updates of a group of leaves, and of the initial parameters that it is measured by."""
    moves = jnp.asarray(member) & (squares > 0)
    reference = jnp.sum(initial, where=moves)
    elements = jnp.sum(jnp.asarray(sizes, initial.dtype), where=moves)
    mean_square = jnp.sum(initial, where=member) / max(np.sum(sizes, where=member), 1.0)
    mean_square = jnp.where(mean_square > 0, mean_square, _ZERO_RMS**2)
    reference = jnp.where(reference > 0, reference, mean_square * elements)
    return jnp.sqrt(jnp.sum(squares, where=member)), jnp.sqrt(reference)


def _scale(leaf: Any, rate: jax.Array) -> jax.Array:
    """The leaf times the rate; zero where the rate is zero, whatever the leaf holds."""
    scaled = _numerics.scale_leaf(leaf, rate)
    if not jnp.issubdtype(scaled.dtype, jnp.inexact):
        return scaled
    return jnp.where(rate == 0, jnp.zeros_like(scaled), scaled)
