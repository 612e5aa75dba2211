"""Under pmap, shard_map and meshes of eight devices every rule decides as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import greedylr_jax
from greedylr_jax.arc import arc
from tests.greedylr_jax import training
from tests.greedylr_jax.rules import crossed, thinned

STEPS = 6
AXIS = "data"


def after_adam(rule):
    return optax.chain(optax.adam(0.02), rule)


RULES = {
    "greedy_lr": lambda **axis: after_adam(greedylr_jax.greedy_lr(**training.OPTIMIZER_SETTINGS, **axis)),
    "greedy_lr, paper": lambda **axis: after_adam(
        greedylr_jax.greedy_lr(algorithm="paper", **training.OPTIMIZER_SETTINGS, **axis)
    ),
    "trend_lr": lambda **axis: after_adam(greedylr_jax.trend_lr(window=2, **axis)),
    "arc": lambda **axis: after_adam(arc(steps_per_cycle=3, **axis)),
    "hypergradient": lambda **_: greedylr_jax.hypergradient(
        optax.adam(1.0), 0.02, 0.1, mode="multiplicative"
    ),
    "auto_lr": lambda **_: greedylr_jax.auto_lr(optax.adam(1.0), total_steps=10),
    "lr_tuner": lambda **axis: greedylr_jax.lr_tuner(
        optax.sgd(1.0), 0.005, explore_steps=STEPS, recompute_every=2, **axis
    ),
    "factor_polling": lambda **axis: after_adam(greedylr_jax.factor_polling(every=2, **axis)),
    "with_rollback": lambda **axis: greedylr_jax.with_rollback(
        after_adam(greedylr_jax.greedy_lr(**training.OPTIMIZER_SETTINGS, **axis)), window=2, **axis
    ),
}


def make_step(tx, average=lambda tree: tree):
    """A training step; ``average`` combines the gradients of all devices, and nothing else."""

    def step(params, state, x, y):
        def value_fn(point):
            return training.loss_fn(point, x, y)

        loss, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(average(grads), state, params, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, batches):
    for x, y in batches:
        params, state = step(params, state, x, y)
    return params, state


def batches():
    x, y = training.data()
    return list(zip(x[:STEPS], y[:STEPS], strict=True))


@functools.cache
def on_one_device(name):
    tx, params = RULES[name](), training.init_params()
    return train(jax.jit(make_step(tx)), params, tx.init(params), batches())


def mean(tree):
    return jax.lax.pmean(tree, AXIS)


def with_pmap(name):
    tx, params = RULES[name](axis_name=AXIS), training.init_params()
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), (params, tx.init(params)))
    parts = [(x.reshape(8, -1, *x.shape[1:]), y.reshape(8, -1)) for x, y in batches()]
    result = train(jax.pmap(make_step(tx, mean), axis_name=AXIS), *copies, parts)
    for leaf in jax.tree.leaves(result):  # all devices have the same parameters and state, to the last bit
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[0], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], result)


def with_shard_map(name):
    tx, params = RULES[name](axis_name=AXIS), training.init_params()
    step = jax.shard_map(
        make_step(tx, mean),
        mesh=jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P(AXIS), P(AXIS)),
        out_specs=P(),
        check_vma=False,
    )
    return train(jax.jit(step), params, tx.init(params), batches())


def with_mesh(name, axis_type):
    tx = RULES[name]()
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(axis_type,))
    params = jax.device_put(training.init_params(), NamedSharding(mesh, P()))
    parts = [jax.device_put(batch, NamedSharding(mesh, P(AXIS))) for batch in batches()]
    with jax.set_mesh(mesh):
        return train(jax.jit(make_step(tx)), params, jax.jit(tx.init)(params), parts)


SETTINGS = {
    "pmap": with_pmap,
    "shard_map": with_shard_map,
    "automatic mesh": functools.partial(with_mesh, axis_type=AxisType.Auto),
    "explicit mesh": functools.partial(with_mesh, axis_type=AxisType.Explicit),
}


@pytest.mark.parametrize(("name", "setting"), thinned(crossed(RULES, SETTINGS), 2))
def test_eight_devices_decide_as_one_does(name, setting):
    got, expected = SETTINGS[setting](name), on_one_device(name)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(leaf, other, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("greedy_lr", "with_rollback") else pytest.mark.slow)
        for name in RULES
    ],
)
def test_an_exported_step_runs_on_the_cpu(name):
    """One program for CPU, GPU and TPU, as ``jax.export`` lowers it."""
    tx, params = RULES[name](), training.init_params()
    arguments = (params, tx.init(params), *batches()[0])
    leaves, structure = jax.tree.flatten(arguments)  # no registration of the states' types is needed

    def step(*leaves):
        return jax.tree.leaves(make_step(tx)(*structure.unflatten(leaves)))

    exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    expected = jax.jit(step)(*leaves)
    for leaf, other in zip(exported.call(*leaves), expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)
