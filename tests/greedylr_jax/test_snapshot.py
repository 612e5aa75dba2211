"""Saving and restoring snapshots, and reading states that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _rule, _snapshot
from tests.greedylr_jax.rules import thinned

NO, YES = jnp.asarray(False), jnp.asarray(True)


def actions(**given):
    return _snapshot.Actions(**({"save": NO, "skip": NO, "restore": NO, "restoring": NO} | given))


DTYPES = {
    "float32 and bfloat16": ((jnp.float32, jnp.bfloat16), (jnp.float32, jnp.bfloat16)),
    "narrow updates": ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float16)),
    "wide updates": ((jnp.bfloat16, jnp.float16), (jnp.float32, jnp.float32)),
}


@pytest.mark.parametrize("dtypes", DTYPES)
def test_restoring_is_exact_to_the_last_bit(dtypes):
    rng = np.random.default_rng(0)
    own, of_updates = DTYPES[dtypes]
    saved = {"w": jnp.asarray(rng.standard_normal(1000), own[0]), "b": jnp.ones(3, own[1])}
    params = jax.tree.map(lambda x: (x * 1e4 + 7).astype(x.dtype), saved)
    zeros = {name: jnp.zeros_like(saved[name], dtype) for name, dtype in zip("wb", of_updates, strict=True)}
    snapshot = _snapshot.take_snapshot(saved, (jnp.float32(0),))
    restoring, steps = NO, 0
    for step in range(_snapshot.RESTORE_STEPS + 1):
        updates, inner_state, snapshot, restoring = _snapshot.act(
            actions(restore=jnp.asarray(step == 0), restoring=restoring),
            zeros,
            (jnp.float32(3),),
            snapshot,
            params,
            (jnp.float32(2),),
        )
        if not restoring:
            break
        steps += 1
        assert inner_state == (0,)
        assert updates["w"].dtype == of_updates[0] and updates["b"].dtype == of_updates[1]
        params = optax.apply_updates(params, updates)
    assert steps and not restoring and _snapshot.are_equal(params, saved)


@pytest.mark.parametrize("save", [NO, YES])
def test_a_snapshot_is_saved_from_before_the_step(save):
    updates, inner_state, snapshot, restores = _snapshot.act(
        actions(save=save),
        jnp.array([0.5]),
        (jnp.float32(3),),
        _snapshot.take_snapshot(jnp.zeros(1), (jnp.float32(1),)),
        jnp.ones(1),
        (jnp.float32(2),),
    )
    assert inner_state == (3,) and not restores
    assert updates[0] == 0.5
    assert snapshot.params[0] == (1 if save else 0)
    assert _snapshot.restored_inner_state(snapshot, inner_state) == ((2,) if save else (1,))


def _state(number):
    """An optimizer state all of whose numbers are ``number``, or have it in them."""
    full = lambda tree: jax.tree.map(lambda leaf: jnp.full_like(leaf, number), tree)  # noqa: E731
    params = {"w": jnp.ones(3)}
    rule = greedylr_jax.greedy_lr().init(params)
    return {
        "adam": full(optax.scale_by_adam().init(params)),
        "rule": full(rule),
        "rate": full(_rule.RateState(jnp.float32(1))),
        "lbfgs": full(optax.scale_by_lbfgs().init(params)),
        "injected": full(optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(1.0)).init(params)),
        "MultiSteps": full(optax.MultiSteps(optax.scale_by_adam(), 9).init(params)),
        "multi_steps": full(greedylr_jax.multi_steps(optax.scale_by_adam(), 9).init(params)),
        "noise": optax.add_noise(0.1, 0.5, jax.random.key(number)).init(params),
    }


@pytest.mark.parametrize("action", ["restore", "skip"])
def test_floating_point_arrays_go_to_earlier_values_and_counts_continue(action):
    """The snapshot's numbers are 1, those before the step 2, those after it 3."""
    params = {"w": jnp.ones(3)}
    saved, before, after = map(_state, (1, 2, 3))
    updates, state, _, restores = _snapshot.act(
        actions(**{action: YES}), params, after, _snapshot.take_snapshot(params, saved), params, before
    )
    assert restores == (action == "restore")
    assert not updates["w"].any()
    earlier = 1 if action == "restore" else 2
    accumulated = 0 if action == "restore" else 2
    assert state["adam"].count == 3 and (state["adam"].mu["w"] == earlier).all()
    for name in ("rule", "rate", "lbfgs"):
        assert all((leaf == earlier).all() for leaf in jax.tree.leaves(state[name]))
    assert state["injected"].hyperparams["learning_rate"] == 3 and state["injected"].count == 3
    for name in ("MultiSteps", "multi_steps"):
        node = state[name]
        assert node.mini_step == node.gradient_step == node.inner_opt_state.count == 3
        assert (node.acc_grads["w"] == accumulated).all()
        assert (node.inner_opt_state.mu["w"] == earlier).all()
    assert state["multi_steps"].value_sum == state["multi_steps"].value_count == accumulated
    assert state["noise"].rng_key == after["noise"].rng_key and state["noise"].count == after["noise"].count


@pytest.mark.parametrize("name", ["MultiSteps", "multi_steps"])
def test_skipping_the_last_micro_batch_empties_the_accumulator(name):
    params, before, after = {"w": jnp.ones(3)}, _state(2)[name], _state(3)[name]
    after = after._replace(mini_step=jnp.int32(0))
    _, state, _, _ = _snapshot.act(
        actions(skip=YES), params, after, _snapshot.take_snapshot(params, before), params, before
    )
    assert state.mini_step == 0 and state.gradient_step == 3 and not state.acc_grads["w"].any()


@pytest.mark.parametrize("where", ["nothing", "update", "sum", "moment", "was infinite", "rule"])
def test_what_counts_as_not_finite(where):
    params = {"w": jnp.array([1.0, 3e38]), "mask": jnp.array([-jnp.inf, 0.0])}
    moments = jax.tree.map(jnp.zeros_like, params)
    rule = greedylr_jax.greedy_lr(window=None).init(params)
    before = after = (moments, rule._replace(rule=rule.rule._replace(best_value=jnp.float32(1))))
    updates = jax.tree.map(jnp.zeros_like, params)
    if where == "update":
        updates["w"] = updates["w"].at[0].set(jnp.nan)
    if where == "sum":
        updates["w"] = updates["w"].at[1].set(3e38)
    infinite = moments | {"w": jnp.array([jnp.inf, 0.0])}
    if where in ("moment", "was infinite"):
        after = (infinite, after[1])
    if where == "was infinite":
        before = after
    if where == "rule":
        after = (moments, rule)  # whose best value is infinite
    expected = where in ("update", "sum", "moment")
    assert _snapshot.check_step(updates, params, after, before)[0] == expected


@pytest.mark.parametrize("leaf", ["w", "b", "mask", None])
def test_one_gradient_that_is_not_zero_is_enough(leaf):
    params = {"w": jnp.ones((2, 3)), "b": jnp.float32(1), "mask": jnp.ones(2, int)}
    gradients = jax.tree.map(jnp.zeros_like, params)
    if leaf is not None:
        gradients[leaf] = gradients[leaf] + 1
    is_nan = jax.tree.map(lambda array: array / 0 if array.ndim == 2 else array, params)
    for updates in (params, is_nan):
        skip, any_nonzero = _snapshot.check_step(updates, params, (), (), gradients)
        assert any_nonzero == (leaf in ("w", "b"))  # integers have no gradient
        assert skip == (updates is is_nan)


def test_without_gradients_none_is_zero():
    params = {"mask": jnp.ones(2, int)}
    assert _snapshot.check_step(params, params, (), (), params)[1]
    assert _snapshot.check_step(params, params, (), ())[1]


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


def _greedy():
    return greedylr_jax.greedy_lr(factor=0.5, patience=0, window=None)


@pytest.mark.parametrize("wrapper", thinned((name for name in WRAPPERS if name != "auto_lr"), 2))
def test_readers_give_the_numbers_of_the_acting_rule(wrapper):
    """After three losses the scale is 2 * 2 / 2, whereas that of a snapshot is still 1, 2 or 4."""
    state = _steps(WRAPPERS[wrapper](optax.chain(optax.sgd(1.0), _greedy())))
    assert greedylr_jax.get_scale(state) == 2.0
    assert _found(state, "scale") == 2.0
    read = greedylr_jax.metrics(state)
    assert [value for name, value in read.items() if name.split("/")[-1] == "scale"] == [2.0]
    if "tuner" not in wrapper:
        assert greedylr_jax.get_learning_rate(state, base_learning_rate=0.25) == 0.5


@pytest.mark.parametrize("wrapper", ["lr_tuner", "lr_tuner, no rollback", "auto_lr"])
def test_readers_give_the_rate_of_an_optimizer_with_its_own(wrapper):
    state = _steps(WRAPPERS[wrapper](optax.sgd(1.0)))
    rate = _found(state, "learning_rate")
    assert rate > 0
    assert greedylr_jax.get_learning_rate(state) == greedylr_jax.metrics(state)["learning_rate"] == rate


@pytest.mark.parametrize(
    "wrapper", thinned((name for name in WRAPPERS if "tuner" not in name and name != "auto_lr"), 2)
)
def test_readers_give_the_rate_of_the_acting_schedule(wrapper):
    schedule = greedylr_jax.greedy_lr_schedule(
        0.25, min_learning_rate=0.025, max_learning_rate=2.5, factor=0.5, patience=0, window=None
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
