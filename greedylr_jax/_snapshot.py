"""Snapshots of parameters and optimizer state: saving, restoring, and skipping steps that are not finite.

A gradient transformation cannot set parameters, only add to them: a snapshot is restored by an update that
equals the difference. Where one addition misses the saved parameters by rounding, further restoring steps
follow until all of them are equal to the last bit.

A step that is skipped or restored does not take the optimizer's whole state back. Moments and other floating
point arrays get their earlier values, whereas

* counts (of schedules, of bias correction), other integers and PRNG keys continue;
* hyperparameters that ``optax.inject_hyperparams`` stores continue;
* the states of rules and of ``optax.lbfgs``, whose counts refer to their own arrays, are taken as a whole;
* gradient accumulation continues its count of micro-batches. The gradients and losses accumulated so far are
  discarded when restoring, and kept when a step is skipped.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedylr_jax import _accumulation, _numerics, _observe, _rule

# Maximum number of restoring steps. Two are enough unless updates are narrower than parameters, where each
# step corrects the leading bits of the rest.
RESTORE_STEPS = 16

_MULTI_STEPS = (_accumulation.MultiStepsState, optax.MultiStepsState)
_INJECTED = (optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState)


class Snapshot(NamedTuple):
    """A copy of the parameters and of the optimizer's state at the same step.

    The parts of the optimizer's state are stored by their path and not as the states that they belong to.
    Otherwise, ``optax.tree.get`` and the readers of this package would find inactive copies of rules.
    """

    params: optax.Params
    inner_state: dict[str, Any]  # path to array, or to a pytree like the parameters


class Actions(NamedTuple):
    """What to do with a step; all False: use it as it is."""

    save: jax.Array  # shape=(), dtype=bool; snapshot the parameters before the step; ignored while restoring
    skip: jax.Array  # shape=(), dtype=bool; drop the step and the moments after it; ignored while restoring
    restore: jax.Array  # shape=(), dtype=bool; start restoring the snapshot
    restoring: jax.Array  # shape=(), dtype=bool; the previous step restored; continue until all are equal


def take_snapshot(params: optax.Params, inner_state: optax.OptState) -> Snapshot:
    """Copies ``params`` and ``inner_state``: a state that holds the same array twice cannot be donated."""
    return jax.tree.map(jnp.array, Snapshot(params, _parts(params, inner_state)[0]))


def restored_inner_state(snapshot: Snapshot, inner_state: optax.OptState) -> optax.OptState:
    """The optimizer's state of a snapshot, in the structure of the current ``inner_state``."""
    parts, structure = _parts(snapshot.params, inner_state)
    return structure.unflatten(snapshot.inner_state[name] for name in parts)


def act(
    actions: Actions,
    updates: optax.Updates,
    inner_state: optax.OptState,
    snapshot: Snapshot,
    params: optax.Params,
    previous_inner_state: optax.OptState,
    axis_name: Hashable | None = None,
) -> tuple[optax.Updates, optax.OptState, Snapshot, jax.Array]:
    """Saves the parameters, skips the step, restores the snapshot, or does nothing.

    Args:
      actions: what to do.
      updates: the updates of this step.
      inner_state: the optimizer's state after this step.
      snapshot: the snapshot to restore.
      params: the parameters before this step.
      previous_inner_state: the optimizer's state before this step, to which ``params`` belong.
      axis_name: mapped axis, or axes, over which ``params`` may be sharded.

    Returns:
      The updates, the optimizer's state, the snapshot, and whether this step restores.
    """

    def turn(_: jax.Array, carry: Any) -> Any:
        updates, inner_state, snapshot, _ = carry
        differs = _observe.any_device(~are_equal(params, snapshot.params), axis_name)
        restores = actions.restore | (actions.restoring & differs)
        save, skip = actions.save & ~restores, actions.skip & ~restores
        saved_state = restored_inner_state(snapshot, inner_state)
        inner_state = _select(skip, _skipped(inner_state, previous_inner_state), inner_state)
        inner_state = _select(restores, _restored(inner_state, saved_state), inner_state)
        difference = jax.tree.map(_difference, snapshot.params, params, updates)
        updates = jax.tree.map(lambda update: jnp.where(skip, jnp.zeros_like(update), update), updates)
        updates = _select(restores, difference, updates)
        current = Snapshot(params, _parts(params, previous_inner_state)[0])
        return updates, inner_state, _select(save, current, snapshot), restores

    # A loop of zero or one iteration works in place. A lax.cond would copy its operands, which are arrays of
    # the parameters' size; so would any other use of the snapshot's arrays.
    needed = actions.save | actions.skip | actions.restore | actions.restoring
    carry = (updates, inner_state, snapshot, jnp.asarray(False))
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), turn, carry)


def steps_left(restores: jax.Array, restoring: jax.Array, left: jax.Array) -> jax.Array:
    """The number of restoring steps that may follow this one."""
    left = jnp.where(restoring, left, RESTORE_STEPS) - 1
    return jnp.where(restores, left, 0).astype(jnp.int32)


_NOT_FINITE, _NONZERO = np.uint8(1), np.uint8(2)  # bits


def check_step(
    updates: optax.Updates,
    params: optax.Params,
    inner_state: optax.OptState,
    previous_inner_state: optax.OptState,
    gradients: optax.Updates | None = None,
    axis_name: Hashable | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Checks a step, in one pass over the arrays.

    Returns:
      * Whether the step makes any element of the parameters or of the moments infinite or NaN. No update
        restores such a parameter, and no gradient such a moment: NaN plus anything is NaN. Moments are the
        parts of the optimizer's state that are like the parameters.
      * Whether any gradient is not zero; true if there are none.
    """
    leaves = jax.tree.leaves(params)
    stepped = [(leaf + update).astype(leaf.dtype) for leaf, update in _leaf_pairs(params, updates)]
    old, new = (_moments(params, state) for state in (previous_inner_state, inner_state))
    gradient_leaves = [None] * len(leaves) if gradients is None else jax.tree.leaves(gradients)
    found, has_gradients = jnp.zeros((), jnp.uint8), False
    for index, (leaf, gradient) in enumerate(zip(leaves, gradient_leaves, strict=True)):
        pairs = [(leaf, stepped[index])]
        pairs += zip(old[index :: len(leaves)], new[index :: len(leaves)], strict=True)
        bits = [
            jnp.where(jnp.isfinite(before) & ~jnp.isfinite(after), _NOT_FINITE, np.uint8(0))
            for before, after in pairs
            if _numerics.is_inexact(before)
        ]
        if gradient is not None and _numerics.is_inexact(gradient):
            has_gradients = True
            bits.append(jnp.where(gradient != 0, _NONZERO, np.uint8(0)))
        if bits:  # one reduction for all arrays like the parameter: on a GPU each is one kernel, or two
            every = functools.reduce(jax.lax.bitwise_or, bits)
            found |= jax.lax.reduce(every, np.uint8(0), jax.lax.bitwise_or, range(every.ndim))
    any_nonzero = (found & _NONZERO) > 0 if has_gradients else jnp.asarray(True)
    becomes_not_finite = _observe.any_device((found & _NOT_FINITE) > 0, axis_name)
    return becomes_not_finite, _observe.any_device(any_nonzero, axis_name)


def are_equal(left: optax.Params, right: optax.Params) -> jax.Array:
    """Whether two trees are equal, to the last bit."""
    return jnp.all(jnp.array([jnp.all(a == b) for a, b in _leaf_pairs(left, right)], bool))


def check_params(name: str, params: optax.Params | None, updates: optax.Updates) -> optax.Params:
    """Returns the parameters that have an update, as arrays, or raises an error if they are missing.

    Where an update is None, as Equinox has it for arrays that are not trained, so is the parameter.
    """
    if params is None:
        raise TypeError(
            f"{name} requires `params`, which it saves and restores; call "
            "tx.update(grads, state, params, value=loss)."
        )
    return jax.tree.map(
        lambda update, part: None if update is None else jax.tree.map(jnp.asarray, part),
        updates,
        params,
        is_leaf=lambda update: update is None,
    )


def check_structure(name: str, snapshot: Snapshot, params: optax.Params) -> None:
    """Raises an error unless the snapshot holds the parameters that have an update, and no others."""
    paths = [
        {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (snapshot.params, params)
    ]
    if different := sorted(paths[0] ^ paths[1]):
        raise ValueError(
            f"{name}: tx.init was called with other parameters than there are updates for; different at "
            f"{', '.join(different[:5])}. Call tx.init with the parameters that are trained, as in "
            "tx.init(eqx.filter(model, eqx.is_inexact_array))."
        )


def _difference(target: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
    """The update that takes ``param`` to ``target``, up to rounding, in the dtype of ``update``."""
    wide = jnp.promote_types(param.dtype, update.dtype)
    difference = target.astype(wide) - param.astype(wide)
    if jnp.issubdtype(update.dtype, jnp.floating) and jnp.finfo(update.dtype).bits < jnp.finfo(wide).bits:
        limit = jnp.finfo(update.dtype).max.astype(wide)
        difference = jnp.clip(difference, -limit, limit)
    return difference.astype(update.dtype)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def _parts(params: optax.Params, inner_state: optax.OptState) -> tuple[dict[str, Any], Any]:
    """The parts of an optimizer's state by path, and the structure that they fill.

    Pytrees like the parameters are one part each, which keeps ``optax.tree.map_params`` working.
    """
    like_params = _structure(params)
    nodes, structure = jax.tree_util.tree_flatten_with_path(
        inner_state, is_leaf=lambda node: _structure(node) == like_params
    )
    return {jax.tree_util.keystr(path): node for path, node in nodes}, structure


def _moments(params: optax.Params, inner_state: optax.OptState) -> list[jax.Array]:
    """The arrays of the parts that are like the parameters, without the states of rules."""
    like_params, shapes = _structure(params), [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]

    def is_part(node: Any) -> bool:
        return _rule.is_rate_state(node) or _structure(node) == like_params

    parts = [
        jax.tree.leaves(node)
        for node in jax.tree.leaves(inner_state, is_leaf=is_part)
        if not _rule.is_rate_state(node) and _structure(node) == like_params
    ]
    return [leaf for part in parts if [jnp.shape(leaf) for leaf in part] == shapes for leaf in part]


def _leaf_pairs(left: Any, right: Any) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def _select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Selects between two trees; the first is cast to the dtypes of the second."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(condition, new if new.dtype == old.dtype else new.astype(old.dtype), old)

    return jax.tree.map(select, on_true, on_false)


def _restored(inner_state: optax.OptState, saved: optax.OptState) -> optax.OptState:
    """The state after restoring: ``saved``, except for the parts of ``inner_state`` that continue."""

    def accumulation(node: Any, earlier: Any) -> Any:
        names = {"acc_grads", "value_sum", "value_count"} & set(node._fields)
        return node._replace(
            inner_opt_state=_restored(node.inner_opt_state, earlier.inner_opt_state),
            **{name: jax.tree.map(jnp.zeros_like, getattr(node, name)) for name in names},
        )

    return _combined(inner_state, saved, _restored, accumulation)


def _skipped(inner_state: optax.OptState, previous: optax.OptState) -> optax.OptState:
    """The state after skipping a step: ``previous``, except for the parts that continue."""

    def accumulation(node: Any, earlier: Any) -> Any:
        is_emptied = node.mini_step == 0  # by the last micro-batch of an optimizer step
        names = {"acc_grads", "value_sum", "value_count"} & set(node._fields)
        kept = {name: getattr(earlier, name) for name in names}
        return node._replace(
            inner_opt_state=_skipped(node.inner_opt_state, earlier.inner_opt_state),
            **jax.tree.map(lambda leaf: jnp.where(is_emptied, jnp.zeros_like(leaf), leaf), kept),
        )

    return _combined(inner_state, previous, _skipped, accumulation)


def _combined(
    inner_state: optax.OptState,
    earlier: optax.OptState,
    recurse: Callable[[Any, Any], Any],
    accumulation: Callable[[Any, Any], Any],
) -> optax.OptState:
    """Floating point arrays of ``earlier`` and other arrays of ``inner_state``; special states as above."""

    def is_whole(node: Any) -> bool:
        return _rule.is_rate_state(node) or isinstance(node, optax.ScaleByLBFGSState)

    def combine(node: Any, earlier: Any) -> Any:
        if is_whole(node):
            return earlier
        if isinstance(node, _MULTI_STEPS):
            return accumulation(node, earlier)
        if isinstance(node, _INJECTED):
            names = {"inner_state", "hyperparams_states"} & set(node._fields)
            fields = {name: recurse(getattr(node, name), getattr(earlier, name)) for name in names}
            return node._replace(**fields)
        dtype = jnp.result_type(node)
        is_number = jnp.issubdtype(dtype, jnp.inexact) or jnp.issubdtype(dtype, jnp.bool_)
        return earlier if is_number else node

    return jax.tree.map(
        combine,
        inner_state,
        earlier,
        is_leaf=lambda node: is_whole(node) or isinstance(node, (*_MULTI_STEPS, *_INJECTED)),
    )
