"""Updates measured against the initial parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedylr_jax import get_learning_rate, metrics, scale_to_parameters

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.zeros(3), "s": jnp.float32(3.0)}
GRADS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([1.0, -2.0, 0.5]), "s": jnp.float32(-4.0)}


def rms(*trees):
    leaves = [np.abs(np.asarray(leaf, np.complex128).ravel()) for leaf in jax.tree.leaves(trees)]
    return np.sqrt(np.mean(np.concatenate(leaves) ** 2))


def update(relative_step, params, grads, **settings):
    tx = scale_to_parameters(relative_step, **settings)
    return jax.jit(tx.update)(grads, tx.init(params))


def test_the_update_has_the_direction_given_and_a_size_relative_to_the_parameters():
    updates, state = update(0.02, PARAMS, GRADS)
    np.testing.assert_allclose(rms(updates), 0.02 * rms(PARAMS), rtol=1e-6)
    for name, grad in GRADS.items():
        np.testing.assert_allclose(updates[name], get_learning_rate(state) * grad, rtol=1e-6)
    np.testing.assert_allclose(metrics(state)["learning_rate"], 0.02 * rms(PARAMS) / rms(GRADS), rtol=1e-6)


def test_the_reference_is_the_initial_size_and_the_relative_step_may_be_a_schedule():
    tx = scale_to_parameters(lambda step: 0.1 / (step + 1))
    state = tx.init(PARAMS)
    for step in range(3):
        grown = jax.tree.map(lambda leaf, step=step: leaf * 10.0**step, PARAMS)
        updates, state = tx.update(GRADS, state, grown)
        np.testing.assert_allclose(rms(updates), 0.1 / (step + 1) * rms(PARAMS), rtol=1e-6)


ONES = jnp.ones((2, 2))
# What is trained, what is added to it, and the leaves in both root mean squares.
KINDS = {
    "zeros beside others, as B of LoRA": ({"A": 3 * ONES, "B": 0 * ONES}, {"A": ONES, "B": -ONES}, "AB"),
    "frozen": ({"w": 3 * ONES, "frozen": 100 * ONES}, {"w": ONES, "frozen": 0 * ONES}, "w"),
    "integers": ({"w": ONES, "i": jnp.arange(4)}, {"w": 5 * ONES, "i": jnp.arange(4)}, "w"),
    "complex": ({"w": (3 + 4j) * ONES}, {"w": (1 - 1j) * ONES}, "w"),
    "bfloat16": ({"w": 3 * ONES.astype("bfloat16"), "b": ONES},
                 {"w": ONES.astype("bfloat16"), "b": ONES}, "wb"),
    "masked": ({"w": ONES, "m": optax.MaskedNode()}, {"w": 7 * ONES, "m": optax.MaskedNode()}, "w"),
    "no leaf and no element": ({"w": ONES, "n": None, "e": jnp.ones((0, 3))},
                               {"w": ONES, "n": None, "e": jnp.ones((0, 3))}, "w"),
    "embedding": ({"table": ONES}, {"table": jnp.array([[3.0, 1.0], [0.0, 0.0]])}, "table"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_any_kind(kind):
    params, grads, counted = KINDS[kind]
    names = [counted] if counted in params else list(counted)
    updates, state = update(0.5, params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert all(a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (updates, grads)), strict=True))
    reference = rms([params[name] for name in names])
    np.testing.assert_allclose(rms([updates[name] for name in names]), 0.5 * reference, rtol=4e-3)
    for name in set(params) - set(names):
        chex_equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), updates[name], grads[name])
        assert all(jax.tree.leaves(chex_equal))
    assert state.squares.dtype == jnp.float32


def test_parameters_that_are_all_zero_have_an_assumed_size():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    np.testing.assert_allclose(rms(update(0.02, zeros, GRADS)[0]), 0.02 * 0.1, rtol=1e-6)
    # What moves is zero, but what does not tells the size.
    updates, _ = update(0.02, PARAMS, {**zeros, "b": GRADS["b"]})
    np.testing.assert_allclose(rms(updates["b"]), 0.02 * rms(PARAMS), rtol=1e-6)
    assert update(0.02, {}, {})[0] == {}


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e30], ids=["zero", "nan", "inf", "overflow"])
def test_updates_without_a_direction_are_zero_and_the_next_ones_unaffected(bad):
    tx = scale_to_parameters(0.02)
    _, state = tx.update(GRADS, tx.init(PARAMS))
    rate = get_learning_rate(state)
    updates, state = jax.jit(tx.update)(jax.tree.map(lambda leaf: leaf * 0 + bad, GRADS), state)
    assert rms(updates) == 0
    assert get_learning_rate(state) == (rate if bad == 0 else 0)
    updates, state = tx.update(GRADS, state)
    np.testing.assert_allclose(rms(updates), 0.02 * rms(PARAMS), rtol=1e-6)
    one_bad = {**GRADS, "s": jnp.float32(np.nan)}
    assert rms(tx.update(one_bad, state)[0]) == 0


LABELS = {"w": "matrix", "b": "rest", "s": "rest"}


@pytest.mark.parametrize(
    "labels", [LABELS, lambda params: {**LABELS, "w": "matrix"}], ids=["tree", "function"]
)
def test_groups_are_measured_one_by_one(labels):
    updates, state = update(0.02, PARAMS, GRADS, param_labels=labels)
    for group in (["w"], ["b", "s"]):
        expected = 0.02 * rms([PARAMS[name] for name in group])
        np.testing.assert_allclose(rms([updates[name] for name in group]), expected, rtol=1e-6)
    expected = 0.02 * rms(PARAMS["w"]) / rms(GRADS["w"])
    np.testing.assert_allclose(get_learning_rate(state, group="matrix"), expected, rtol=1e-6)


@pytest.mark.parametrize("params_unit", [2.0**-30, 1.0, 2.0**40])
@pytest.mark.parametrize("grads_unit", [2.0**-40, 1.0, 2.0**30])
def test_units_that_are_powers_of_two_change_no_bit(params_unit, grads_unit):
    def scale(tree, unit):
        return jax.tree.map(lambda leaf: leaf * unit, tree)

    expected, _ = update(0.02, PARAMS, GRADS)
    updates, _ = update(0.02, scale(PARAMS, params_unit), scale(GRADS, grads_unit))
    for name in PARAMS:
        np.testing.assert_array_equal(updates[name], expected[name] * params_unit)


@pytest.mark.parametrize("size", [1.0, 0.0])
@pytest.mark.parametrize("bias", ["sharded", "replicated"])
def test_sharded_parameters_are_measured_as_a_whole(bias, size):
    params = {"w": size * jnp.linspace(-1.0, 2.0, 24), "b": size * jnp.linspace(3.0, 5.0, 8)}
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)), params)
    tx = scale_to_parameters(0.02, shard_axis_name="shard")
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((4,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": spec("shard"), "b": spec("shard") if bias == "sharded" else spec()}
    for check_vma in (True, False) if bias == "sharded" else (True,):
        sharded = jax.jit(
            jax.shard_map(
                lambda params, grads: tx.update(grads, tx.init(params)),
                mesh=mesh,
                in_specs=(specs, specs),
                out_specs=(specs, spec()),
                check_vma=check_vma,
            )
        )(params, grads)
        chex.assert_trees_all_close(sharded, update(0.02, params, grads), rtol=1e-5)


def test_sharded_parameters_are_not_gathered():
    mesh = jax.make_mesh((8,), ("shards",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "shards"))
    params = {"w": jax.device_put(jnp.ones((64, 1024)), sharding)}
    tx = scale_to_parameters(0.02)
    state = tx.init(params)
    program = jax.jit(tx.update).lower(params, state).compile().as_text()
    assert "all-reduce" in program  # of the sum of squares
    assert "all-gather" not in program


def test_the_relative_step_is_checked_and_may_be_traced():
    with pytest.raises(ValueError, match="relative_step must be a number"):
        scale_to_parameters(-0.1)
    steps = jnp.array([0.01, 0.02])
    updates = jax.vmap(lambda step: update(step, PARAMS, GRADS)[0])(steps)
    for index, step in enumerate(steps):
        np.testing.assert_allclose(updates["w"][index], update(float(step), PARAMS, GRADS)[0]["w"], rtol=1e-6)
