"""The checks of Optax's own test suites, over every rule.

They follow Optax's ``contrib/_common_test.py``, ``alias_test.py`` and ``sharding_test.py``: convergence,
dtypes, ``init`` of shapes, ``map_params``, sharded states, and wrappers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import greedylr_jax
from greedylr_jax.arc import arc
from tests.greedylr_jax.rules import BASE_RATE, RATE_OPTIMIZERS, SCALE_RULES, crossed

START = {"w": jnp.array([-1.0, 10.0, 1.0, 0.0]), "b": jnp.array([1.0, 0.0])}
TARGET = {"w": jnp.array([1.0, -1.0, 1.0, 0.5]), "b": jnp.array([0.0, 1.0])}
LABELS = {"w": "all", "b": "all"}


def parabola(params):
    squares = jax.tree.map(lambda x, y: jnp.sum(jnp.abs(x - y.astype(x.dtype)) ** 2), params, TARGET)
    return sum(jax.tree.leaves(squares)).astype(jnp.float32)


def rosenbrock(params):
    """Rosenbrock's function of ``b`` over 100, so that rates of the order of 0.1 are stable."""
    x, y = params["b"]
    return ((1 - x) ** 2 / 100 + (y - x**2) ** 2).astype(jnp.float32)


def with_rule(case, adapter, base=optax.sgd):
    if adapter == "schedule":
        return optax.inject_hyperparams(base)(learning_rate=case.schedule())
    return optax.chain(base(BASE_RATE), case.transformation())


OPTIMIZERS = {
    f"{case.name}-{adapter}": functools.partial(with_rule, case, adapter)
    for case in SCALE_RULES
    for adapter in ("transformation", "schedule")
} | {name: lambda tx=tx: tx for name, tx in RATE_OPTIMIZERS.items()}
SLOW = ("arc", "lr_tuner", "auto_lr")  # they take seconds to compile


def step(tx, loss_fn, params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    if not isinstance(tx, optax.MultiSteps):  # it takes extra arguments, but its type does not show it
        tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
    return updates, state, loss


def train(tx, loss_fn, steps, start=START):
    def body(carry, _):
        params, state = carry
        updates, state, loss = step(tx, loss_fn, params, state)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda start: jax.lax.scan(body, (start, tx.init(start)), length=steps))
    (params, _), losses = run(start)
    return params, np.append(losses, loss_fn(params))


def scheduled(make, base=optax.sgd):
    """A schedule as the learning rate, from a tenth to ten times the initial rate."""
    return lambda rate: optax.inject_hyperparams(base)(
        learning_rate=make(rate, min_learning_rate=rate / 10, max_learning_rate=rate * 10)
    )


# Every rule with settings with which it should converge, given an initial rate.
CONVERGENT = {
    "greedy": lambda rate: optax.chain(optax.sgd(rate), greedylr_jax.greedy_lr()),
    "greedy-schedule": scheduled(greedylr_jax.greedy_lr_schedule),
    "greedy-paper": lambda rate: optax.chain(
        optax.sgd(rate), greedylr_jax.greedy_lr(algorithm="paper", reset_after=500)
    ),
    "trend": lambda rate: optax.chain(optax.sgd(rate), greedylr_jax.trend_lr()),
    "trend-schedule": scheduled(greedylr_jax.trend_lr_schedule),
    "arc": lambda rate: optax.chain(optax.sgd(rate), arc(steps_per_cycle=100, validation=False)),
    "hypergradient": lambda rate: greedylr_jax.hypergradient(optax.sgd(1.0), rate, 1e-6),
    "hypergradient-parameter": lambda rate: greedylr_jax.hypergradient(
        optax.sgd(1.0), rate, 1e-6, granularity="parameter"
    ),
    "hypergradient-multiplicative": lambda rate: greedylr_jax.hypergradient(
        optax.sgd(1.0), rate, 1e-3, mode="multiplicative", max_learning_rate=10 * rate
    ),
    "lr_tuner": lambda rate: greedylr_jax.lr_tuner(
        optax.sgd(1.0), rate, explore_steps=100, recompute_every=10
    ),
    "with_rollback": lambda rate: greedylr_jax.with_rollback(optax.sgd(rate)),
    "factor_polling": lambda rate: optax.chain(
        optax.sgd(rate), greedylr_jax.factor_polling(every=10, sharpness=1.0, max_scale=10.0)
    ),
}


@pytest.mark.parametrize("problem", ["parabola", "rosenbrock"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(SLOW)) for name in CONVERGENT]
)
def test_converges(name, problem):
    """At least as well as gradient descent with the initial rate."""
    loss_fn, rate = {"parabola": (parabola, 0.01), "rosenbrock": (rosenbrock, 0.015)}[problem]
    _, losses = train(CONVERGENT[name](rate), loss_fn, 3000)
    _, baseline = train(optax.sgd(rate), loss_fn, 3000)
    assert np.isfinite(losses).all()
    assert losses[-1] <= 1.001 * baseline[-1]


SHARDED: dict[str, str] = {}


def with_known_failures(reasons):
    """The optimizers as parameters of a test; ``reasons`` are those of the ones known to fail."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reasons[name]))
        if name in reasons
        else name
        for name in OPTIMIZERS
    ]


def types(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


DTYPES = ("bfloat16", "float16", "float32", "complex64", "float64")


@pytest.mark.parametrize(("name", "dtype"), crossed(OPTIMIZERS, DTYPES))
def test_updates_have_the_dtype_of_the_parameters_and_the_state_keeps_its_types(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), START)
        tx = OPTIMIZERS[name]()
        state = jax.eval_shape(tx.init, params)
        updates, after, _ = jax.eval_shape(functools.partial(step, tx, parabola), params, state)
        assert types(updates) == types(params)
        assert types(after) == types(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_of_shapes_gives_the_shapes_of_the_state(name):
    tx = OPTIMIZERS[name]()
    assert types(jax.eval_shape(tx.init, START)) == types(tx.init(START))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_map_params_maps_what_is_like_the_parameters_and_nothing_else(name):
    tx = OPTIMIZERS[name]()
    state = tx.init(START)
    mapped = optax.tree.map_params(
        tx, lambda leaf: "parameter", state, transform_non_params=lambda leaf: "other"
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for path, kind in jax.tree_util.tree_leaves_with_path(mapped):
        is_like_params = jax.tree_util.keystr(path).endswith(("['w']", "['b']"))
        assert kind == ("parameter" if is_like_params else "other"), path
    # Values of the parameters may be given along with them.
    added = optax.tree.map_params(tx, lambda leaf, param: (leaf + param).astype(leaf.dtype), state, START)
    assert types(added) == types(state)


@pytest.mark.parametrize("name", with_known_failures(SHARDED))
def test_states_are_sharded_like_the_parameters_on_an_explicit_mesh(name):
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Explicit,))
    specs = {"w": P("shard"), "b": P()}
    tx = OPTIMIZERS[name]()

    def loss_fn(params):
        return (jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)).astype(jnp.float32)

    with jax.set_mesh(mesh):
        params = {
            leaf: jax.device_put(jnp.ones(16), NamedSharding(mesh, spec)) for leaf, spec in specs.items()
        }
        state = jax.eval_shape(tx.init, params)
        updates, after, _ = jax.eval_shape(functools.partial(step, tx, loss_fn), params, state)

    def spec_of(leaf):
        axes = () if leaf.sharding is None else tuple(leaf.sharding.spec)
        return P(*axes) if any(axes) else P()

    assert jax.tree.map(spec_of, updates) == specs
    assert jax.tree.map(spec_of, after) == jax.tree.map(spec_of, state)
    optax.tree.map_params(tx, lambda leaf, spec: assert_equal(spec_of(leaf), spec), state, specs)


def assert_equal(got, expected):
    assert got == expected


def with_scale(tx):
    return optax.inject_hyperparams(lambda factor: optax.chain(tx, optax.scale(factor)))(factor=1.0)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(100.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(100.0)), ("optimizer", tx)),
    "greedylr_jax.chain": lambda tx: greedylr_jax.chain(optax.clip(100.0), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition({"all": tx}, LABELS),
    "flatten": optax.flatten,
    "freeze": lambda tx: optax.chain(tx, optax.freeze({"w": False, "b": True})),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "MultiSteps, skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "multi_steps": lambda tx: greedylr_jax.multi_steps(tx, 2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
    "inject_hyperparams": with_scale,
}


def fits(name, wrapper):
    """Labels of groups and ``value_fn`` refer to the parameters, which ``optax.flatten`` makes one vector."""
    return wrapper != "flatten" or not name.startswith(("hypergradient-group", "lr_tuner", "factor_polling"))


@pytest.mark.parametrize(
    ("name", "wrapper"), [pair for pair in crossed(OPTIMIZERS, WRAPPERS) if fits(*pair.values)]
)
def test_trains_in_a_wrapper(name, wrapper):
    tx = WRAPPERS[wrapper](OPTIMIZERS[name]())
    params, losses = train(tx, parabola, 24)
    assert np.isfinite(losses).all() and losses.min() < losses[0]
    assert types(params) == types(START)
