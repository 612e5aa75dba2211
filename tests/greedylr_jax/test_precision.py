"""Rules that compare losses set the precision of matrix products, which on a TPU is bfloat16 by default.

A CPU ignores that precision. Here a product rounds its factors to bfloat16, as a TPU does, unless the
precision at its place is "highest".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax.theory import estimate_smoothness

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (64, 32))
PARAMS = {"hidden": jax.random.normal(KEYS[1], (32, 24)) / 6, "out": jax.random.normal(KEYS[2], (24, 1)) / 5}


def plain_product(left, right):
    return left @ right


def tpu_product(left, right):
    if jax.config.jax_default_matmul_precision == "highest":
        return left @ right
    return jax.lax.reduce_precision(left, 8, 7) @ jax.lax.reduce_precision(right, 8, 7)


def loss_with(product):
    def loss_fn(params):
        hidden = jnp.tanh(product(X, params["hidden"]))
        return jnp.mean((product(hidden, params["out"])[:, 0] - jnp.sin(X.sum(axis=1))) ** 2)

    return loss_fn


def lr_tuner(rate, **precision):
    return greedylr_jax.lr_tuner(
        optax.sgd(1.0), rate, explore_steps=10, recompute_every=1, epsilon_threshold=1e6, **precision
    )


def factor_polling(rate, **precision):
    return optax.chain(optax.sgd(rate), greedylr_jax.factor_polling(sharpness=20.0, **precision))


def rate_after_one_step(tx, product, rate):
    """The learning rate that the rule takes; gradients and loss are those of exact products."""
    loss, grads = jax.value_and_grad(loss_with(plain_product))(PARAMS)
    _, state = jax.jit(
        lambda grads, state: tx.update(grads, state, PARAMS, value=loss, value_fn=loss_with(product))
    )(grads, tx.init(PARAMS))
    return float(greedylr_jax.get_learning_rate(state, base_learning_rate=rate))


RULES = {"lr_tuner": (lr_tuner, 1e-3), "factor_polling": (factor_polling, 1e-5)}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_decides_on_a_tpu_as_with_exact_products(name):
    make, rate = RULES[name]
    exact = rate_after_one_step(make(rate), plain_product, rate)
    assert exact > 1.5 * rate
    np.testing.assert_allclose(rate_after_one_step(make(rate), tpu_product, rate), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "precision",
    [None, pytest.param("default", marks=pytest.mark.slow), pytest.param("high", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", RULES)
def test_with_rounded_products_it_would_not(name, precision):
    """Without this the test above would say nothing. Here "high" is rounded, too."""
    make, rate = RULES[name]
    exact = rate_after_one_step(make(rate), plain_product, rate)
    rounded = rate_after_one_step(make(rate, matmul_precision=precision), tpu_product, rate)
    assert not 0.9 < rounded / exact < 1.1


def test_smoothness_on_a_tpu():
    def estimate(product, **precision):
        return float(estimate_smoothness(loss_with(product), PARAMS, tolerance=1e-5, **precision))

    exact = estimate(plain_product)
    assert abs(estimate(tpu_product) / exact - 1) < 1e-6
    assert abs(estimate(tpu_product, matmul_precision=None) / exact - 1) > 1e-4


def products(function, *arguments):
    """The precisions of the matrix products in a function, by the text of its program."""
    lines = jax.jit(function).lower(*arguments).as_text().splitlines()
    lines = [line for line in lines if "stablehlo.dot_general" in line]
    return ["HIGHEST" in line for line in lines]


def test_only_the_products_of_the_probe_are_in_float32():
    loss_fn = loss_with(plain_product)

    def step(params, state, **extra_args):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return tx.update(grads, state, params, value=loss, **extra_args)

    tx = lr_tuner(1e-3)
    state = tx.init(PARAMS)
    probing = products(lambda params, state: step(params, state, value_fn=loss_fn), PARAMS, state)
    bare = products(jax.value_and_grad(loss_fn), PARAMS)
    assert not any(bare)
    assert sum(probing) == 2 and len(probing) == len(bare) + 2


def test_derivatives_have_the_precision_of_the_function():
    taylor = lr_tuner(1e-3, method="taylor")
    loss_fn = loss_with(plain_product)
    found = products(
        lambda grads, state: taylor.update(grads, state, PARAMS, value=1.0, value_fn=loss_fn),
        PARAMS,
        taylor.init(PARAMS),
    )
    assert len(found) > 4 and all(found)
    assert all(products(lambda params: estimate_smoothness(loss_fn, params), PARAMS))


@pytest.mark.parametrize("make", [lr_tuner, factor_polling])
def test_an_unknown_precision(make):
    with pytest.raises(ValueError, match=r"matmul_precision must be one of 'default', .* got 'exact'"):
        make(1e-3, matmul_precision="exact")
    with pytest.raises(ValueError, match="matmul_precision"):
        estimate_smoothness(loss_with(plain_product), PARAMS, matmul_precision=3)
