"""Snapshots of parameters and optimizer state, and restoring them.

A gradient transformation cannot set parameters, only add to them: a snapshot is restored by an update that
equals the difference. Where one addition misses the saved parameters by rounding, further restoring steps
follow until all of them are equal to the last bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from greedylr_jax import _numerics

RESTORE_STEPS = 4  # maximum number of restoring steps; rounding never needs more


class Snapshot(NamedTuple):
    """A copy of the parameters and of the optimizer's state at the same step.

    The parts of the optimizer's state are stored by their path and not as the states that they belong to.
    Otherwise, ``optax.tree.get`` and the readers of this package would find inactive copies of rules.
    """

    params: optax.Params
    inner_state: dict[str, Any]  # path to array, or to a pytree like the parameters


def take_snapshot(params: optax.Params, inner_state: optax.OptState) -> Snapshot:
    """Copies ``params`` and ``inner_state``: a state that holds the same array twice cannot be donated."""
    return jax.tree.map(jnp.array, _view(params, inner_state))


def restored_inner_state(snapshot: Snapshot, inner_state: optax.OptState) -> optax.OptState:
    """The optimizer's state of a snapshot, in the structure of the current ``inner_state``."""
    parts, structure = _parts(snapshot.params, inner_state)
    return structure.unflatten(snapshot.inner_state[name] for name in parts)


def _view(params: optax.Params, inner_state: optax.OptState) -> Snapshot:
    return Snapshot(params, _parts(params, inner_state)[0])


def _parts(params: optax.Params, inner_state: optax.OptState) -> tuple[dict[str, Any], Any]:
    """The parts of an optimizer's state by path, and the structure that they fill.

    Pytrees like the parameters are one part each, which keeps ``optax.tree.map_params`` working.
    """

    def structure_of(tree: Any) -> Any:
        return jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))

    like_params = structure_of(params)
    nodes, structure = jax.tree_util.tree_flatten_with_path(
        inner_state, is_leaf=lambda node: structure_of(node) == like_params
    )
    return {jax.tree_util.keystr(path): node for path, node in nodes}, structure


def save_or_restore(
    updates: optax.Updates,
    inner_state: optax.OptState,
    snapshot: Snapshot,
    *,
    params: optax.Params,
    previous_inner_state: optax.OptState,
    needed: jax.Array,
    restore: jax.Array,
    restoring: jax.Array,
    save: jax.Array,
) -> tuple[optax.Updates, optax.OptState, Snapshot, jax.Array]:
    """Restores the snapshot, or replaces it by the current parameters, or does nothing.

    Args:
      updates: the updates of this step.
      inner_state: the optimizer's state after this step.
      snapshot: the snapshot to restore.
      params: the parameters before this step.
      previous_inner_state: the optimizer's state before this step, to which ``params`` belong.
      needed: whether any of the following three is set; nothing is done otherwise.
      restore: start restoring the snapshot.
      restoring: the previous step was restoring; continue until the parameters match exactly.
      save: snapshot ``params``; ignored while restoring.

    Returns:
      The updates, the optimizer's state, the snapshot, and whether this step restores.
    """

    def act(_: jax.Array, carry: Any) -> Any:
        updates, inner_state, snapshot, _ = carry
        restores = restore | (restoring & ~are_equal(params, snapshot.params))
        restored = (difference(snapshot.params, params), restored_inner_state(snapshot, inner_state))
        current = (drop_non_finite(updates, params), inner_state)
        updates, inner_state = _numerics.select(restores, restored, current)
        saved = _numerics.select(save & ~restores, _view(params, previous_inner_state), snapshot)
        return updates, inner_state, saved, restores

    # A loop of zero or one iteration works in place. A lax.cond would copy its operands, which are arrays of
    # the parameters' size; so would any other use of the snapshot's arrays.
    carry = (updates, inner_state, snapshot, jnp.asarray(False))
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), act, carry)


def difference(target: optax.Params, params: optax.Params) -> optax.Updates:
    """The update that takes ``params`` to ``target``, up to rounding."""
    return jax.tree.map(lambda a, b: (a - b).astype(b.dtype), target, params)


def are_equal(left: optax.Params, right: optax.Params) -> jax.Array:
    """Whether two trees are equal, to the last bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.all(jnp.array([jnp.all(a == b) for a, b in pairs]))


def drop_non_finite(
    updates: optax.Updates, params: optax.Params, condition: jax.Array | bool = True
) -> optax.Updates:
    """Zeroes the elements of an update that would make a parameter infinite or NaN, if ``condition`` is set.

    No update restores such a parameter: NaN plus anything is NaN.
    """
    condition = jnp.asarray(condition)

    def check(update: jax.Array, param: jax.Array) -> jax.Array:
        if not jnp.issubdtype(update.dtype, jnp.inexact):
            return update
        return jnp.where(condition & ~jnp.isfinite(param + update), jnp.zeros_like(update), update)

    return jax.tree.map(check, updates, params)


def check_params(name: str, params: optax.Params | None) -> None:
    """Raises an error that shows the right call if ``params`` is missing."""
    if params is None:
        raise TypeError(
            f"{name} requires `params`, which it saves and restores; call "
            "tx.update(grads, state, params, value=loss)."
        )
