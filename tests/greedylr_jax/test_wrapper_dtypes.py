"""Wrappers of optimizers: dtypes of parameters and gradients, and sharded parameters."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from tests.greedylr_jax.rules import mostly_slow, thinned

REAL = ("float16", "bfloat16", "float32")
PAIRS = [*itertools.product(REAL, REAL), ("complex64", "complex64")]
WIDE_PAIRS = [("float64", "float64"), ("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")]
WRAPPERS = {
    "with_rollback": lambda: greedylr_jax.with_rollback(optax.sgd(0.1), window=2),
    "with_rollback and a rule": lambda: greedylr_jax.with_rollback(
        greedylr_jax.chain(optax.sgd(0.1), greedylr_jax.greedy_lr()), window=2
    ),
    "lr_tuner": lambda: greedylr_jax.lr_tuner(optax.sgd(1.0), 0.1, explore_steps=8, recompute_every=2),
    "lr_tuner, no rollback": lambda: greedylr_jax.lr_tuner(
        optax.sgd(1.0), 0.1, explore_steps=8, recompute_every=2, rollback=False
    ),
    "multi_steps": lambda: greedylr_jax.multi_steps(optax.sgd(0.2), 2),
    "multi_steps inside": lambda: greedylr_jax.with_rollback(
        greedylr_jax.multi_steps(optax.sgd(0.2), 2), window=2
    ),
}


def loss_fn(params):
    return sum(jnp.sum(jnp.square(jnp.abs(leaf - 1)).astype(jnp.float32)) for leaf in jax.tree.leaves(params))


def train(tx, params, dtype, steps=12):
    """Runs a scan, which fails if any dtype of the state changes; the loss is NaN once."""
    tx = optax.with_extra_args_support(tx)

    def body(carry, step):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads = jax.tree.map(lambda leaf: leaf.conj().astype(dtype), grads)
        value = jnp.where(step == 8, jnp.nan, loss)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), jnp.arange(steps)))(params)


def check(wrapper, pairs):
    for own, of_gradients in pairs:
        params = {"w": jnp.zeros(5, own), "b": jnp.zeros((), own)}
        train(optax.sgd(0.1), params, of_gradients)  # plain SGD runs
        (params, _), losses = train(WRAPPERS[wrapper](), params, of_gradients)
        assert all(leaf.dtype == own for leaf in jax.tree.leaves(params))
        assert losses[-1] < 0.5 * losses[0], (own, of_gradients)


@pytest.mark.parametrize("wrapper", mostly_slow(WRAPPERS))
def test_parameters_and_gradients_may_have_any_dtypes(wrapper):
    check(wrapper, PAIRS)


@pytest.mark.parametrize("wrapper", mostly_slow(WRAPPERS, "with_rollback and a rule", "lr_tuner"))
def test_parameters_and_gradients_may_have_64_bits(wrapper):
    with jax.enable_x64(True):
        check(wrapper, WIDE_PAIRS)


def test_complex_gradients_are_accumulated_with_their_imaginary_parts():
    tx = greedylr_jax.multi_steps(optax.sgd(1.0), 2)
    params = jnp.zeros(2, jnp.complex64)
    state = tx.init(params)
    for gradient in (1 + 2j, 3 - 6j):
        updates, state = tx.update(jnp.full(2, gradient, jnp.complex64), state, params, value=1.0)
    np.testing.assert_array_equal(updates, -np.full(2, 2 - 2j))


@pytest.mark.parametrize(
    ("inner", "integer"),
    [
        (optax.sgd(0.1), jnp.zeros(2, jnp.int32)),
        (optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)), None),
    ],
    ids=["integer parameters", "PRNG key"],
)
def test_integers_and_prng_keys_pass(inner, integer):
    tx = greedylr_jax.with_rollback(inner, window=2)
    params = {"w": jnp.ones(3), "steps": integer}
    state = tx.init(params)
    for loss in (1.0, 0.5, jnp.nan, 0.5):
        updates, state = jax.jit(tx.update)(params, state, params, value=loss)
        expected, _ = inner.update(params, inner.init(params), params)
        chex.assert_trees_all_equal_dtypes(updates, expected)
    assert state.num_rollbacks == 1


SHARDED = {
    # Gradients on the four devices at the fifth of six steps; numbers of rollbacks and of skipped steps.
    "zero on some": ([0.0, 1.0, 0.0, 1.0], (0, 0)),
    "zero on all": ([0.0, 0.0, 0.0, 0.0], (1, 0)),
    "NaN on one": ([1.0, jnp.nan, 1.0, 1.0], (0, 1)),
    "finite": ([1.0, 1.0, 1.0, 1.0], (0, 0)),
}


@pytest.mark.parametrize("case", thinned(SHARDED, 2))
def test_devices_with_parts_of_the_parameters_decide_alike(case):
    gradients, (num_rollbacks, num_skipped) = SHARDED[case]
    inner = greedylr_jax.chain(optax.sgd(0.0, momentum=0.9), greedylr_jax.greedy_lr())
    tx = greedylr_jax.with_rollback(inner, window=2, axis_name="device")

    def device(params, gradient):
        state = tx.init(params)
        # A snapshot is saved at the fourth loss; the fifth is above its mean.
        for step, loss in enumerate((2.0, 2.0, 1.0, 1.0, 1.001, 1.001)):
            grads = gradient if step == 4 else jnp.ones(())
            updates, state = tx.update(grads, state, params, value=loss)
            params = params + updates
        return params, state.num_rollbacks, state.num_skipped, greedylr_jax.get_scale(state)

    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("device")

    def on_shard(params, gradient):
        return jax.tree.map(lambda leaf: leaf[None], device(params[0], gradient[0]))

    run = jax.shard_map(on_shard, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    params, rollbacks, skipped, scales = jax.jit(run)(jnp.arange(4.0), jnp.asarray(gradients, jnp.float32))
    assert rollbacks.tolist() == [num_rollbacks] * 4
    assert skipped.tolist() == [num_skipped] * 4
    assert len(set(scales.tolist())) == 1 and (scales[0] < 1) == bool(num_rollbacks)
    np.testing.assert_array_equal(params, np.arange(4.0))
