"""When to go back, and that what is kept is come back to, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np

from greedylr_jax import rollback


def follow(losses, state=None):
    """The steps at which the way is back, and the last state."""
    state = rollback.watch_from(jnp.float32(1), jnp.float32(0.01)) if state is None else state
    state, returns = jax.lax.scan(rollback.watch, state, jnp.asarray(losses, jnp.float32))
    return np.flatnonzero(returns).tolist(), state


LIMIT = 1 + 6 * np.sqrt(0.01 / 3)


def test_twenty_bad_losses_in_a_row_are_a_way_back_and_nineteen_are_not():
    high = [LIMIT + 0.01] * 19
    assert follow([*high, 1.0, *high])[0] == []
    assert follow([1.0, *high, np.nan])[0] == [20]
    assert follow([LIMIT - 0.01] * 100)[0] == []
    assert follow([np.inf] * 20)[0] == [19]


def test_where_a_return_changes_nothing_the_losses_of_old_are_forgotten():
    returns, state = follow([5.0] * 100)
    assert returns == [19]  # once, and not for ever
    assert state.limit == np.inf and rollback.improves(state, jnp.float32(5.0))


def test_where_a_return_helped_there_may_be_another():
    assert follow(([5.0] * 20 + [1.0]) * 3)[0] == [19, 40, 61]


def test_going_there_and_back_loses_no_bit():
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.standard_normal(1000), jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    far = jax.tree.map(lambda x: (x * 1e6 + 7).astype(x.dtype), start)
    kept, params, settles = rollback.Kept(start, None), far, jnp.asarray(False)
    steps = jax.tree.map(jnp.zeros_like, start)
    for turn in range(rollback.SETTLING_STEPS + 1):
        updates, inner, kept, settles = rollback.exchange(
            steps,
            jnp.float32(3),
            kept,
            params=params,
            old_inner_state=jnp.float32(3),
            needed=jnp.asarray(True),
            goes_back=jnp.asarray(turn == 0),
            settles=settles,
            takes=jnp.asarray(False),
            init=lambda params: jnp.float32(0),
        )
        if not settles:
            break
        assert inner == 0  # a fresh optimizer
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    assert not settles and rollback.are_equal(params, start)


def test_nothing_is_done_where_nothing_is_needed():
    no = jnp.asarray(False)
    updates, inner, kept, returns = rollback.exchange(
        jnp.array([jnp.inf]),
        jnp.float32(3),
        rollback.Kept(jnp.zeros(1), jnp.float32(1)),
        params=jnp.ones(1),
        old_inner_state=jnp.float32(2),
        needed=no,
        goes_back=no,
        settles=no,
        takes=jnp.asarray(True),
    )
    assert updates[0] == jnp.inf and inner == 3 and kept.inner_state == 1 and not returns
