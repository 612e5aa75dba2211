"""Wrappers pass extra arguments on to inner transformations that understand them, such as line searches."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _forwarding
from greedylr_jax.range_test import range_test
from tests.greedylr_jax.rules import crossed

CURVATURES = jnp.array([0.3, 1.0, 4.0, 9.0])
START = {"w": jnp.array([1.0, -2.0, 0.5, 1.5])}


def loss_fn(params):
    return 0.5 * jnp.sum(CURVATURES * params["w"] ** 2)


WRAPPERS = {
    "with_rollback": greedylr_jax.with_rollback,
    "multi_steps": lambda tx: greedylr_jax.multi_steps(tx, 1),
    "lr_tuner": lambda tx: greedylr_jax.lr_tuner(tx, 1.0, explore_steps=0, recompute_every=1000),
    "both": lambda tx: greedylr_jax.with_rollback(greedylr_jax.multi_steps(tx, 1)),
}
LINE_SEARCHES = {
    "lbfgs": optax.lbfgs,
    "lbfgs and a rule": lambda: optax.chain(optax.lbfgs(), greedylr_jax.greedy_lr()),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    ),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=15)),
}
FAST = {("with_rollback", "lbfgs"), ("lr_tuner", "backtracking")}


def run(tx, steps=12, value_fn=loss_fn, **extra_args):
    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            grads, state, params, value=loss, grad=grads, value_fn=value_fn, **extra_args
        )
        return optax.apply_updates(params, updates), state

    params, state = START, tx.init(START)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@functools.cache
def bare(search):
    return run(LINE_SEARCHES[search]())


@pytest.mark.parametrize(
    ("wrapper", "search"),
    [
        pytest.param(*each.values, marks=[] if each.values in FAST else pytest.mark.slow)
        for each in crossed(WRAPPERS, LINE_SEARCHES)
    ],
)
def test_a_wrapped_line_search_equals_the_bare_one(wrapper, search):
    params = run(WRAPPERS[wrapper](LINE_SEARCHES[search]()), has_value=jnp.asarray(True))
    np.testing.assert_allclose(params["w"], bare(search)["w"], rtol=1e-5, atol=1e-6)
    assert loss_fn(params) < 0.1 * loss_fn(START)


# Wrappers that set the learning rate, which a line search then changes.
SCALING = {
    "hypergradient": lambda tx: greedylr_jax.hypergradient(tx, 1.0, 0.0),
    "auto_lr": greedylr_jax.auto_lr,
}
# Transformations whose type does not say that they accept extra arguments, or that reject unknown ones.
PARTICULAR = {
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(optax.sgd(0.1), greedylr_jax.greedy_lr(patience=0)), 1
    ).gradient_transformation(),
    "line search": LINE_SEARCHES["backtracking"],
}


@pytest.mark.parametrize("inner", PARTICULAR)
@pytest.mark.parametrize("wrapper", WRAPPERS | SCALING)
def test_every_wrapper_passes_on_what_inner_accepts(wrapper, inner):
    tx = (WRAPPERS | SCALING)[wrapper](PARTICULAR[inner]())
    params = run(tx, steps=2, has_value=jnp.asarray(True))
    assert loss_fn(params) < loss_fn(START)


@pytest.mark.parametrize("inner", PARTICULAR)
def test_the_range_test_passes_on_what_inner_accepts(inner):
    result = range_test(lambda params, _: loss_fn(params), START, jnp.zeros(20), inner=PARTICULAR[inner]())
    assert jnp.min(result.losses) < loss_fn(START)


def test_with_rollback_around_lbfgs_is_lbfgs():
    params = run(greedylr_jax.with_rollback(optax.lbfgs()))
    np.testing.assert_array_equal(params["w"], bare("lbfgs")["w"])


def test_arguments_of_value_fn_still_reach_it():
    def with_data(params, data):
        return loss_fn(params) + 0 * data

    params = run(
        greedylr_jax.with_rollback(optax.lbfgs()), value_fn=with_data, has_value=jnp.asarray(True), data=1.0
    )
    np.testing.assert_allclose(params["w"], bare("lbfgs")["w"], rtol=1e-5, atol=1e-6)


VALUE_FNS = {
    "plain": lambda params: params,
    "with data": lambda params, data=0: params + data,
    "any": lambda params, **extra: params + extra["data"],
    "partial": functools.partial(lambda factor, params, data=0: factor * (params + data), 2),
}


@pytest.mark.parametrize("name", VALUE_FNS)
def test_value_fn_ignores_arguments_of_rules(name):
    got = {}

    def update(updates, state, params=None, *, value_fn, **extra_args):
        got.update(extra_args)
        accepted = {name: 3 for name in inspect.signature(value_fn).parameters if name == "has_value"}
        assert accepted
        return value_fn(1, **({} if name == "plain" else {"data": 5}), **accepted), state

    tx = _forwarding.accept_extra_args(optax.GradientTransformationExtraArgs(lambda params: (), update))
    value, _ = tx.update(None, (), value_fn=VALUE_FNS[name], has_value=True, grad=None)
    assert value == {"plain": 1, "with data": 6, "any": 6, "partial": 12}[name]
    assert got == {"has_value": True}


def test_arguments_that_are_not_accepted_are_left_out():
    def update(updates, state, params=None, *, value=None):
        return value, state

    tx = _forwarding.accept_extra_args(optax.GradientTransformationExtraArgs(lambda params: (), update))
    assert tx.update(None, (), value=3, has_value=True, grad=1)[0] == 3
    plain = _forwarding.accept_extra_args(optax.sgd(1.0))
    assert plain.update(jnp.ones(()), plain.init(jnp.ones(())), value=3, has_value=True)[0] == -1
    steps = _forwarding.accept_extra_args(optax.MultiSteps(greedylr_jax.greedy_lr(), 1))
    with pytest.raises(TypeError, match="greedy_lr needs the loss"):
        steps.update(jnp.ones(()), steps.init(jnp.ones(())))
    steps.update(jnp.ones(()), steps.init(jnp.ones(())), value=1.0)
