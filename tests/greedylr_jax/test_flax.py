"""Rules in the training loops of Flax."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import greedylr_jax
import greedylr_jax.flax
from tests.greedylr_jax.rules import BASE_RATE, rule_parameters

X = jax.random.normal(jax.random.key(0), (16, 3))
Y = X @ jnp.array([[1.0], [-2.0], [0.5]])
every_rule = pytest.mark.parametrize("case", rule_parameters())


def mean_square(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def optimizer(case, adapter):
    if adapter == "schedule":
        return optax.inject_hyperparams(optax.adam)(learning_rate=case.schedule())
    return optax.chain(optax.adam(BASE_RATE), case.transformation())


def optax_run(loss_fn, params, tx, steps):
    """The same training with plain Optax."""
    state, rates = tx.init(params), []
    step = jax.jit(lambda params, state: _optax_step(loss_fn, params, tx, state))
    for _ in range(steps):
        params, state = step(params, state)
        rates.append(float(greedylr_jax.get_learning_rate(state, BASE_RATE)))
    return params, rates


def _optax_step(loss_fn, params, tx, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", pytest.param("schedule", marks=pytest.mark.slow)])
def test_an_nnx_optimizer_trains_as_plain_optax_does(case, adapter):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    expected, expected_rates = optax_run(
        lambda params: mean_square(nnx.merge(graph, params), X, Y), params, optimizer(case, adapter), 12
    )
    nnx_optimizer = nnx.Optimizer(model, optimizer(case, adapter), wrt=nnx.Param)

    @nnx.jit
    def step(model, nnx_optimizer):
        loss, grads = nnx.value_and_grad(mean_square)(model, X, Y)
        nnx_optimizer.update(model, grads, value=loss)

    rates = []
    for _ in range(12):
        step(model, nnx_optimizer)
        rates.append(float(greedylr_jax.get_learning_rate(nnx_optimizer.opt_state, BASE_RATE)))
    assert rates == expected_rates
    assert len(set(rates)) > 1
    assert greedylr_jax.metrics(nnx_optimizer.opt_state)["scale"] == rates[-1] / BASE_RATE
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(nnx.state(model)[name][...], expected[name][...], rtol=1e-6)


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_readers_give_plain_arrays_for_an_nnx_optimizer(case, adapter):
    nnx_optimizer = nnx.Optimizer(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optimizer(case, adapter), wrt=nnx.Param)
    state = nnx_optimizer.opt_state
    read = {
        "get_scale": greedylr_jax.get_scale(state),
        "get_learning_rate": greedylr_jax.get_learning_rate(state, BASE_RATE),
    } | greedylr_jax.metrics(state)
    for name, value in read.items():
        assert type(value) is type(jnp.ones(())), name
        assert f"{float(value):.3f}" == f"{value:.3f}", name


@pytest.mark.parametrize("granularity", ["global", "parameter"])
def test_the_rates_of_an_optimizer_with_its_own_are_plain_arrays(granularity):
    tx = greedylr_jax.hypergradient(optax.sgd(1.0), 0.125, 1e-3, granularity=granularity)
    nnx_optimizer = nnx.Optimizer(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    rates = jax.tree.leaves(greedylr_jax.get_learning_rate(nnx_optimizer.opt_state))
    assert len(rates) == (1 if granularity == "global" else 2)
    for rate in rates:
        assert type(rate) is type(jnp.ones(()))
    if granularity == "global":
        assert f"{greedylr_jax.get_learning_rate(nnx_optimizer.opt_state):.3f}" == "0.125"


@every_rule
def test_a_linen_train_state_trains_as_plain_optax_does(case):
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), X)["params"]
    tx = optimizer(case, "transformation")

    def loss_fn(params):
        return mean_square(lambda x: model.apply({"params": params}, x), X, Y)

    expected, expected_rates = optax_run(loss_fn, params, tx, 12)
    state = greedylr_jax.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    assert isinstance(state, train_state.TrainState)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss)

    rates = []
    for _ in range(12):
        state = step(state)
        rates.append(float(greedylr_jax.get_learning_rate(state.opt_state, BASE_RATE)))
    assert rates == expected_rates
    assert len(set(rates)) > 1
    assert state.step == 12 and state.tx is tx
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6)


class WithStatistics(greedylr_jax.flax.TrainState):
    """A train state with a field of its own, as users make them for batch statistics."""

    statistics: float = 0.0


def linen_state(tx):
    return greedylr_jax.flax.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)


def test_the_train_state_is_otherwise_that_of_flax():
    grads = {"w": jnp.ones(2)}
    ours = linen_state(optax.adam(0.1)).apply_gradients(grads=grads, value=1.0)
    theirs = train_state.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
    theirs = theirs.apply_gradients(grads=grads)
    chex.assert_trees_all_equal(ours.params, theirs.params)
    chex.assert_trees_all_equal(ours.opt_state, theirs.opt_state)
    extended = WithStatistics.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
    extended = extended.apply_gradients(grads=grads, value=1.0, statistics=2.0)
    assert isinstance(extended, WithStatistics) and extended.statistics == 2.0
    with pytest.raises(TypeError):
        ours.apply_gradients(grads=grads, vaule=1.0)


def test_the_train_state_hands_on_has_value_and_value_fn():
    state = linen_state(greedylr_jax.greedy_lr(patience=0))
    grads = {"w": jnp.ones(2)}
    after = state.apply_gradients(grads=grads, has_value=False)
    assert greedylr_jax.get_scale(after.opt_state) == 1
    with pytest.raises(TypeError, match="needs the loss"):
        state.apply_gradients(grads=grads)

    search = linen_state(optax.contrib.momo(learning_rate=1.0))
    assert search.apply_gradients(grads=grads, value=jnp.float32(1.0)).step == 1
    accumulated = linen_state(
        optax.MultiSteps(optax.chain(optax.sgd(1.0), greedylr_jax.greedy_lr(patience=0)), 1)
    )
    after = accumulated.apply_gradients(grads=grads, value=1.0)
    assert greedylr_jax.get_scale(after.opt_state) > 1


class Counted(nnx.Module):
    """A model that counts its calls and drops out, as stateful models do."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(self.dropout(x))


def test_a_transformation_without_extra_arguments_gets_none():
    plain = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (updates, state)
    )
    before = linen_state(plain)
    after = before.apply_gradients(grads=before.params, value=1.0)
    np.testing.assert_array_equal(after.params["w"], 2 * before.params["w"])


def pure(state):
    """The state with arrays in the places of its variables."""
    return jax.tree.map(lambda leaf: leaf[...], state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def test_value_fn_is_the_loss_of_the_parameters_and_leaves_the_model_alone():
    model = Counted(nnx.Rngs(0))
    loss_of = greedylr_jax.flax.value_fn(model, mean_square, X, Y)
    params = nnx.state(model, nnx.Param)
    first = loss_of(params)
    assert first == loss_of(pure(params)) == jax.jit(loss_of)(params)  # the same dropout each time
    assert model.calls[...] == 0
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    assert loss_of(moved) != first
    assert mean_square(model, X, Y) == first


def test_value_fn_drives_a_line_search_through_the_nnx_optimizer():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    search = optax.chain(optax.sgd(100.0), optax.scale_by_backtracking_linesearch(30))
    nnx_optimizer = nnx.Optimizer(model, search, wrt=nnx.Param)

    @nnx.jit
    def step(model, nnx_optimizer):
        loss, grads = nnx.value_and_grad(mean_square)(model, X, Y)
        value_fn = greedylr_jax.flax.value_fn(model, mean_square, X, Y)
        nnx_optimizer.update(model, grads, value=loss, grad=grads, value_fn=value_fn)
        return loss

    values = [float(step(model, nnx_optimizer)) for _ in range(20)]
    assert all(np.diff(values) <= 0)  # a rate of 100 alone would diverge
    assert values[-1] < 0.05 * values[0]
