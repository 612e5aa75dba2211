"""The way back to parameters that a training has left.

A gradient transformation cannot set parameters, only add to them: it leads back by an update that is the
difference. Where one addition does not reach the old parameters to the last bit, further steps do.
"""

import jax
import jax.numpy as jnp
import optax

SETTLING_STEPS = 4  # more than rounding can take to lead back to parameters


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
