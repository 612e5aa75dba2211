"""Saving and restoring snapshots, and reading states that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _snapshot

NO, YES = jnp.asarray(False), jnp.asarray(True)


def test_restoring_is_exact_to_the_last_bit():
    rng = np.random.default_rng(0)
    saved = {"w": jnp.asarray(rng.standard_normal(1000), jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    params = jax.tree.map(lambda x: (x * 1e6 + 7).astype(x.dtype), saved)
    snapshot = _snapshot.take_snapshot(saved, (jnp.float32(0),))
    restoring, steps = NO, 0
    for step in range(_snapshot.RESTORE_STEPS + 1):
        updates, inner_state, snapshot, restoring = _snapshot.save_or_restore(
            jax.tree.map(jnp.zeros_like, saved),
            (jnp.float32(3),),
            snapshot,
            params=params,
            previous_inner_state=(jnp.float32(3),),
            needed=YES,
            restore=jnp.asarray(step == 0),
            restoring=restoring,
            save=NO,
        )
        if not restoring:
            break
        steps += 1
        assert inner_state == (0,)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    assert steps > 1 and not restoring and _snapshot.are_equal(params, saved)


@pytest.mark.parametrize("needed", [NO, YES])
def test_a_snapshot_is_saved_only_if_needed(needed):
    updates, inner_state, snapshot, restores = _snapshot.save_or_restore(
        jnp.array([jnp.inf]),
        (jnp.float32(3),),
        _snapshot.take_snapshot(jnp.zeros(1), (jnp.float32(1),)),
        params=jnp.ones(1),
        previous_inner_state=(jnp.float32(2),),
        needed=needed,
        restore=NO,
        restoring=NO,
        save=YES,
    )
    assert inner_state == (3,) and not restores
    assert updates[0] == (0 if needed else jnp.inf)
    assert snapshot.params[0] == (1 if needed else 0)
    assert _snapshot.restored_inner_state(snapshot, inner_state) == ((2,) if needed else (1,))


PARAMS = {"w": jnp.linspace(-1.0, 1.0, 5), "b": jnp.ones(2)}


def loss_fn(params):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def _tuned(inner, rollback=True):
    return greedylr_jax.lr_tuner(inner, 0.5, explore_steps=9, recompute_every=5, rollback=rollback)


# Wrappers of this package hold snapshots; those of Optax must be transparent to the readers around them.
WRAPPERS = {
    "with_rollback": lambda tx: greedylr_jax.with_rollback(tx, window=2),
    "with_rollback, twice": lambda tx: greedylr_jax.with_rollback(greedylr_jax.with_rollback(tx), window=2),
    "lr_tuner": _tuned,
    "lr_tuner, no rollback": lambda tx: _tuned(tx, rollback=False),
    "auto_lr": greedylr_jax.auto_lr,
    "multi_steps": lambda tx: greedylr_jax.multi_steps(tx, 1),
    "chain": lambda tx: optax.chain(greedylr_jax.with_rollback(tx, window=2)),
    "named_chain": lambda tx: optax.named_chain(("optimizer", greedylr_jax.with_rollback(tx, window=2))),
    "MultiSteps": lambda tx: optax.MultiSteps(greedylr_jax.with_rollback(tx, window=2), 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(greedylr_jax.with_rollback(tx, window=2), 3),
    "MultiSteps inside": lambda tx: greedylr_jax.with_rollback(optax.MultiSteps(tx, 1), window=2),
    "masked inside": lambda tx: greedylr_jax.with_rollback(optax.masked(tx, {"w": True, "b": True})),
}


def _steps(tx, count=3):
    state = tx.init(PARAMS)
    for loss in (1.0, 0.5, 0.75, 0.25)[:count]:
        _, state = tx.update(PARAMS, state, PARAMS, value=loss, value_fn=loss_fn)
    return state


def _found(state, name):
    return optax.tree.get(state, name, filtering=lambda path, value: isinstance(value, jax.Array))


def _rule():
    return greedylr_jax.greedy_lr(factor=0.5, patience=0, window=None)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "auto_lr"])  # has its own scale
def test_readers_give_the_numbers_of_the_acting_rule(wrapper):
    """After three losses the scale is 2 * 2 / 2, whereas that of a snapshot is still 1, 2 or 4."""
    state = _steps(WRAPPERS[wrapper](optax.chain(optax.sgd(1.0), _rule())))
    assert greedylr_jax.get_scale(state) == 2.0
    assert _found(state, "scale") == 2.0
    read = greedylr_jax.metrics(state)
    assert [value for name, value in read.items() if name.split("/")[-1] == "scale"] == [2.0]
    if not optax.tree.get_all_with_path(state, "learning_rate"):
        assert greedylr_jax.get_learning_rate(state, base_learning_rate=0.25) == 0.5


@pytest.mark.parametrize("wrapper", ["lr_tuner", "lr_tuner, no rollback", "auto_lr"])
def test_readers_give_the_rate_of_an_optimizer_with_its_own(wrapper):
    state = _steps(WRAPPERS[wrapper](optax.sgd(1.0)))
    rate = _found(state, "learning_rate")
    assert rate > 0
    assert greedylr_jax.get_learning_rate(state) == greedylr_jax.metrics(state)["learning_rate"] == rate


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if "tuner" not in name and name != "auto_lr"])
def test_readers_give_the_rate_of_the_acting_schedule(wrapper):
    schedule = greedylr_jax.greedy_lr_schedule(
        0.25, min_value=0.025, max_value=2.5, factor=0.5, patience=0, window=None
    )
    state = _steps(WRAPPERS[wrapper](optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)))
    assert greedylr_jax.get_learning_rate(state) == 0.5
    assert greedylr_jax.get_scale(state) == 2.0
    assert _found(state, "learning_rate") == 0.5


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if "auto" not in name])
@pytest.mark.parametrize("params", [PARAMS, jnp.ones(3)], ids=["dict", "array"])
def test_map_params_reaches_the_snapshot(wrapper, params):
    if "masked" in wrapper and not isinstance(params, dict):
        pytest.skip("the mask is a dict")
    tx = WRAPPERS[wrapper](optax.adam(1.0))
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: "param", state, transform_non_params=lambda leaf: "other")
    for leaf, mark in zip(jax.tree.leaves(state), jax.tree.leaves(marked), strict=True):
        assert mark == ("param" if leaf.shape in ((5,), (2,), (3,)) else "other")
