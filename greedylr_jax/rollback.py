"""The way back to parameters that a training has left, and when to take it.

A gradient transformation cannot set parameters, only add to them: it leads back by an update that is the
difference. Where one addition does not reach the old parameters to the last bit, further steps do. LRTuner
and :func:`greedylr_jax.auto_lr` have their own reasons to go back, and share the means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from greedylr_jax import base
from greedylr_jax._window import rise_limit

SETTLING_STEPS = 4  # more than rounding can take to lead back to parameters
BAD_LOSSES = 20  # in a row, above the limit, that a training does not recover from


def difference(there: optax.Params, here: optax.Params) -> optax.Updates:
    """The update that leads from ``here`` to ``there``, up to rounding."""
    return jax.tree.map(lambda a, b: (a - b).astype(b.dtype), there, here)


def are_equal(left: optax.Params, right: optax.Params) -> jax.Array:
    """Whether two trees are equal, to the last bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.all(jnp.array([jnp.all(a == b) for a, b in pairs]))


def where_finite(condition: jax.Array, updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """Leaves out the elements of an update that would make a parameter infinite or NaN.

    From there no update leads back: NaN plus anything is NaN.
    """

    def check(update: jax.Array, param: jax.Array) -> jax.Array:
        if not jnp.issubdtype(update.dtype, jnp.inexact):
            return update
        return jnp.where(condition & ~jnp.isfinite(param + update), jnp.zeros_like(update), update)

    return jax.tree.map(check, updates, params)


class Kept(NamedTuple):
    """What a training can go back to."""

    params: optax.Params
    inner_state: Any  # None where it is a fresh one


def exchange(
    steps: optax.Updates,
    inner_state: optax.OptState,
    kept: Kept,
    *,
    params: optax.Params,
    old_inner_state: optax.OptState,
    needed: jax.Array,
    goes_back: jax.Array,
    settles: jax.Array,
    takes: jax.Array,
    init: Callable[[optax.Params], optax.OptState] | None = None,
) -> tuple[optax.Updates, optax.OptState, Kept, jax.Array]:
    """Goes back to what is kept, or keeps something new, or does nothing.

    Args:
      steps: the updates of this step.
      inner_state: the optimizer's state after this step.
      kept: what to go back to.
      params: the parameters before this step.
      old_inner_state: the optimizer's state before this step, which belongs to ``params``.
      needed: whether there is anything to do; False where the next three are.
      goes_back: whether the way is back.
      settles: whether the way was back in the step before; it goes on until the parameters are equal.
      takes: whether ``params`` are to be kept, where the way is not back.
      init: makes the state to go on with from the kept parameters, where none is kept.

    Returns:
      Updates, optimizer's state, what is kept now, and whether this step is one of the way back.
    """

    def turn(_: jax.Array, carry: Any) -> Any:
        steps, inner_state, kept, _ = carry
        returns = goes_back | (settles & ~are_equal(params, kept.params))
        fresh = kept.inner_state if init is None else init(kept.params)
        guarded = where_finite(jnp.asarray(True), steps, params)
        back = (difference(kept.params, params), fresh)
        steps, inner_state = base.select(returns, back, (guarded, inner_state))
        new = Kept(params, old_inner_state if init is None else None)
        return steps, inner_state, base.select(takes & ~returns, new, kept), returns

    # A loop of one turn or none works in place. A lax.cond would copy what it hands through, which are
    # arrays of the parameters' size; so would any other use of the snapshot's arrays.
    carry = (steps, inner_state, kept, jnp.asarray(False))
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), turn, carry)


class Watch(NamedTuple):
    """The losses where a snapshot was taken, and those since."""

    level: jax.Array  # shape=(), dtype=float; their mean, infinite if not known
    limit: jax.Array  # shape=(), dtype=float; a training that goes on as it did falls below this now and then
    num_bad: jax.Array  # shape=(), dtype=int32; losses in a row above the limit
    has_recovered: jax.Array  # shape=(), dtype=bool; whether one was not, since the last return


def unwatched() -> Watch:
    """Nothing is known, and no loss but those that are not finite is bad."""
    infinity = jnp.full((), jnp.inf, base.default_float_dtype())
    return Watch(infinity, jnp.array(infinity), jnp.zeros((), jnp.int32), jnp.ones((), bool))


def watch(state: Watch, loss: jax.Array) -> tuple[Watch, jax.Array]:
    """The state after one more loss, and whether the way is back to the snapshot now.

    A return after which no loss is good has shown that the parameters are not at fault: the losses have
    changed for another reason, and what they were is forgotten.
    """
    is_bad = ~(loss <= state.limit)
    num_bad = jnp.where(is_bad, state.num_bad + 1, 0)
    is_lost = num_bad >= BAD_LOSSES
    returns, forgets = is_lost & state.has_recovered, is_lost & ~state.has_recovered
    return Watch(
        level=jnp.where(forgets, jnp.inf, state.level),
        limit=jnp.where(forgets, jnp.inf, state.limit),
        num_bad=jnp.where(is_lost, 0, num_bad),
        has_recovered=(state.has_recovered | ~is_bad) & ~returns,
    ), returns


def improves(state: Watch, mean: jax.Array) -> jax.Array:
    """Whether a window's mean loss is the least so far, so that its parameters are worth keeping."""
    return mean < state.level


def watch_from(mean: jax.Array, variance: jax.Array) -> Watch:
    """The state where a snapshot is taken; ``variance`` is that of single losses."""
    return unwatched()._replace(level=mean, limit=rise_limit(mean, variance))
