"""Optimizers with their own learning rate: wrappers, dtypes, x64, vmap, devices, and bad losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax.theory import local_smoothness
from tests.greedylr_jax.rules import RATE_OPTIMIZERS, crossed, thinned

TARGET = {"w": jnp.linspace(-1.0, 2.0, 6), "b": jnp.array([0.5, -0.5])}
START = {"w": jnp.zeros(6), "b": jnp.zeros(2)}
STEPS = 60
# Of the loss. Parameters of zero tell auto_lr nothing about the distance, so it needs more steps.
REMAINING = {"auto_lr": 0.999}
PROBING = [name for name in RATE_OPTIMIZERS if name.startswith(("lr_tuner", "factor_polling"))]


def loss_fn(params, noise=0.0):
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b.astype(a.dtype) - noise)), params, TARGET)
    return sum(jax.tree.leaves(squares)).astype(jnp.float32)


def rates(state):
    """All learning rates and scales that the readers return."""
    read = greedylr_jax.metrics(state)
    found = {key: value for key, value in read.items() if "learning_rate" in key or "scale" in key}
    assert found
    return found


def train(tx, start=START, noise=0.1, bad_steps=()):
    if not isinstance(tx, optax.MultiSteps):  # it accepts them, but is not of that type
        tx = optax.with_extra_args_support(tx)

    def body(carry, inputs):
        params, state = carry
        offset, bad = inputs
        loss, grads = jax.value_and_grad(loss_fn)(params, offset)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=jnp.where(bad, jnp.nan, loss),
            value_fn=lambda p: jnp.where(bad, jnp.nan, loss_fn(p, offset)),
        )
        return (optax.apply_updates(params, updates), state), rates(state)

    offsets = noise * np.random.default_rng(0).standard_normal(STEPS).astype(np.float32)
    bad = np.isin(np.arange(STEPS), bad_steps)
    run = jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), (offsets, bad)))
    (params, state), history = run(start)
    return params, state, history


@pytest.fixture(scope="module")
def bare():
    return {name: train(tx) for name, tx in RATE_OPTIMIZERS.items()}


# Wrappers that do not change the updates of the optimizer inside.
TRANSPARENT = {
    "named_chain": lambda tx: optax.named_chain(("optimizer", tx)),
    "clipping before it": lambda tx: greedylr_jax.chain(optax.clip_by_global_norm(1e9), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps of one": lambda tx: optax.MultiSteps(tx, 1),
    "multi_steps of one": lambda tx: greedylr_jax.multi_steps(tx, 1),
}
KEY_PREFIX = {"named_chain": "optimizer/"}


@pytest.mark.parametrize(("name", "wrapper"), crossed(RATE_OPTIMIZERS, TRANSPARENT))
def test_a_transparent_wrapper_does_not_change_the_run(name, wrapper, bare):
    params, _, history = train(TRANSPARENT[wrapper](RATE_OPTIMIZERS[name]))
    expected_params, _, expected = bare[name]
    for key, values in expected.items():
        np.testing.assert_allclose(history[KEY_PREFIX.get(wrapper, "") + key], values, rtol=1e-4)
    np.testing.assert_allclose(params["w"], expected_params["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RATE_OPTIMIZERS)
def test_the_learning_rate_changes_and_the_loss_decreases(name, bare):
    params, _, history = bare[name]
    assert any(np.ptp(values) > 0 for values in history.values())
    assert loss_fn(params) < REMAINING.get(name, 0.3) * loss_fn(START)


@pytest.mark.parametrize("name", [name for name in RATE_OPTIMIZERS if name.startswith("hypergradient")])
def test_hypergradient_trains_a_part_of_the_parameters(name):
    """The rest of the updates, the gradients of "b", is set to zero."""
    only_w = {"w": True, "b": False}
    tx = optax.with_extra_args_support(RATE_OPTIMIZERS[name])
    rest = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    params, _, history = train(optax.chain(optax.masked(tx, only_w), rest))
    assert np.abs(params["w"] - TARGET["w"]).max() < 0.5
    np.testing.assert_array_equal(params["b"], START["b"])
    assert any(np.ptp(values) > 0 for values in history.values())


@pytest.mark.parametrize("name", PROBING)
def test_with_gradient_accumulation_a_probing_rule_evaluates_the_last_micro_batch(name):
    params, _, history = train(greedylr_jax.multi_steps(RATE_OPTIMIZERS[name], 2))
    assert loss_fn(params) < 0.7 * loss_fn(START)
    for values in history.values():
        assert np.ptp(values) > 0
        np.testing.assert_array_equal(values[1:-1:2], values[2::2])  # changes only with an update


@pytest.mark.parametrize("name", RATE_OPTIMIZERS)
def test_rates_and_averages_stay_wide_beside_bfloat16_parameters(name):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), START)
    params, state, history = train(RATE_OPTIMIZERS[name], start)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert all(values.dtype == jnp.float32 for values in history.values())
    wide = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if (leaf.shape == () or "learning_rate" in jax.tree_util.keystr(path))
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert wide
    assert all(leaf.dtype == jnp.float32 for leaf in wide)
    assert loss_fn(params) < REMAINING.get(name, 0.3) * loss_fn(START)


@pytest.mark.parametrize("name", RATE_OPTIMIZERS)
def test_with_64_bits_rates_are_float64(name):
    with jax.enable_x64(True):
        # This includes the losses and averages in the state.
        start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), START)
        params, _, history = train(RATE_OPTIMIZERS[name], start)
    assert all(values.dtype == jnp.float64 for values in history.values())
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))


DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
SGD_RULES = {
    **{
        f"hypergradient-{mode}-{granularity}": greedylr_jax.hypergradient(
            optax.sgd(1.0),
            0.1,
            0.0,
            mode=mode,
            granularity=granularity,
            param_labels={"w": "weights", "b": "bias"} if granularity == "group" else None,
        )
        for mode in ("additive", "multiplicative")
        for granularity in ("global", "group", "parameter")
    },
    "factor_polling": optax.chain(optax.sgd(0.1), greedylr_jax.factor_polling((1.0,))),
    "local_smoothness": optax.chain(local_smoothness(), optax.sgd(0.1)),
}


def quadratic_run(tx, dtype, gradient_dtype):
    """Parameters and updates of three steps in one scan, with gradients of another dtype."""
    tx = optax.with_extra_args_support(tx)
    start = jax.tree.map(lambda leaf: (leaf + 1).astype(dtype), START)

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda leaf: jnp.real(leaf).astype(gradient_dtype), params)
        if gradient_dtype == "complex64":
            grads = jax.tree.map(lambda leaf: leaf * (1 + 0.5j), grads)
        updates, state = tx.update(grads, state, params, value=1.0, value_fn=lambda params: 1.0)
        return (optax.apply_updates(params, updates), state), updates

    (params, _), updates = jax.lax.scan(body, (start, tx.init(start)), length=3)
    return params, updates


@pytest.mark.filterwarnings("ignore:Casting from complex")
@pytest.mark.parametrize(("name", "gradient_dtype"), crossed(SGD_RULES, DTYPES))
def test_gradients_may_have_another_dtype_than_the_parameters(name, gradient_dtype):
    """At a constant learning rate, updates have dtypes and values of plain SGD."""
    with jax.enable_x64(True):
        for dtype in DTYPES:
            run = functools.partial(quadratic_run, dtype=dtype, gradient_dtype=gradient_dtype)
            expected = jax.eval_shape(functools.partial(run, optax.sgd(0.1)))
            assert jax.eval_shape(functools.partial(run, SGD_RULES[name])) == expected
        run = functools.partial(quadratic_run, dtype="float32", gradient_dtype=gradient_dtype)
        got, expected = jax.jit(lambda: (run(SGD_RULES[name]), run(optax.sgd(0.1))))()
    chex.assert_trees_all_close(got, expected, rtol=1e-2)


@pytest.mark.parametrize("name", RATE_OPTIMIZERS)
def test_losses_that_are_not_finite_do_not_propagate(name):
    params, _, history = train(RATE_OPTIMIZERS[name], bad_steps=(0, 1, 7, 8, 20, 41))
    for leaf in jax.tree.leaves((params, history)):
        assert np.isfinite(leaf).all()
    assert loss_fn(params) < REMAINING.get(name, 0.5) * loss_fn(START)


@pytest.mark.parametrize("name", RATE_OPTIMIZERS)
def test_a_step_transfers_nothing_and_its_buffers_can_be_donated(name):
    tx = optax.with_extra_args_support(RATE_OPTIMIZERS[name])

    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, START)
    params, state = donating(params, tx.init(params))
    with jax.transfer_guard("disallow"):
        before = state
        params, state = donating(params, state)
        jax.block_until_ready(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert jax.tree.structure(before) == jax.tree.structure(state)


@pytest.mark.parametrize("name", thinned(RATE_OPTIMIZERS, 2))
def test_mapped_runs_equal_single_ones(name):
    tx = optax.with_extra_args_support(RATE_OPTIMIZERS[name])

    def run(scale):
        def body(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
            return (optax.apply_updates(params, updates), state), rates(state)

        start = jax.tree.map(lambda leaf: leaf + scale, START)
        return jax.lax.scan(body, (start, tx.init(start)), length=12)[1]

    scales = jnp.array([0.0, 0.3, 2.0])
    mapped = jax.jit(jax.vmap(run))(scales)
    for index, scale in enumerate(scales):
        single = jax.jit(run)(scale)
        assert any(np.ptp(values) > 0 for values in single.values())
        for key, values in single.items():
            np.testing.assert_allclose(mapped[key][index], values, rtol=2e-4)


@pytest.mark.parametrize("name", PROBING)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value_fn": None}, TypeError, "evaluates the loss along the step"),
        ({"params": None}, TypeError, "needs the parameters"),
        ({"value": jnp.ones(3)}, ValueError, "value must be a scalar loss"),
        ({"value": "high"}, TypeError, "value must be a real scalar loss"),
    ],
)
def test_an_incomplete_call_of_a_probing_rule_raises_an_error_with_the_right_call(
    name, arguments, error, message
):
    tx = RATE_OPTIMIZERS[name]
    call = {"params": START, "value": 1.0, "value_fn": loss_fn} | arguments
    with pytest.raises(error, match=message) as caught:
        tx.update(START, tx.init(START), **call)
    assert "tx.update(" in str(caught.value)


@pytest.mark.parametrize("name", ["lr_tuner-fit", "lr_tuner-taylor", "factor_polling"])
def test_under_shard_map_all_devices_take_the_same_decisions(name):
    """Each device has a part of the data; learning rates equal those of one device with all of it."""
    settings = {"explore_steps": 99, "recompute_every": 2}
    make = {
        "lr_tuner-fit": lambda **axis: greedylr_jax.lr_tuner(optax.sgd(1.0), 0.01, **settings, **axis),
        "lr_tuner-taylor": lambda **axis: greedylr_jax.lr_tuner(
            optax.sgd(1.0), 0.01, method="taylor", **settings, **axis
        ),
        "factor_polling": lambda **axis: optax.chain(optax.sgd(0.01), greedylr_jax.factor_polling(**axis)),
    }[name]
    data = jnp.asarray(np.random.default_rng(0).standard_normal((16, 6)), jnp.float32)

    def batch_loss(params, x):
        return jnp.mean((x @ params["w"] - x.sum(axis=1)) ** 2)

    def run(tx, x, average):
        params = {"w": jnp.zeros(6)}

        def body(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(batch_loss)(params, x)
            updates, state = tx.update(
                average(grads), state, params, value=loss, value_fn=lambda p: batch_loss(p, x)
            )
            return (optax.apply_updates(params, updates), state), rates(state)

        return jax.lax.scan(body, (params, tx.init(params)), length=8)[1]

    expected = jax.jit(lambda x: run(make(), x, lambda tree: tree))(data)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.jit(
        jax.shard_map(
            lambda x: run(make(axis_name="data"), x, lambda tree: jax.lax.pmean(tree, "data")),
            mesh=mesh,
            in_specs=spec("data"),
            out_specs=spec(),
            check_vma=False,
        )
    )(data)
    for key, values in expected.items():
        assert np.ptp(values) > 0
        np.testing.assert_allclose(sharded[key], values, rtol=1e-4)
