"""The checks of Optax's own test suites, over every rule.

After ``contrib/_common_test.py``, ``alias_test.py``, ``transforms/*_test.py`` and ``sharding_test.py`` of Optax:
convergence, dtypes, ``init`` of shapes, ``map_params``, sharded states, and wrappers.
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
        return optax.inject_hyperparams(base, hyperparam_dtype=jnp.float32)(learning_rate=case.schedule())
    return optax.chain(base(BASE_RATE), case.transformation())


OPTIMIZERS = {
    f"{case.name}-{adapter}": functools.partial(with_rule, case, adapter)
    for case in SCALE_RULES
    for adapter in ("transformation", "schedule")
} | {name: lambda tx=tx: tx for name, tx in RATE_OPTIMIZERS.items()}
TAKES_SECONDS = ("arc", "lr_tuner", "auto_lr")  # to compile


def optimizers(slow=TAKES_SECONDS, fails=None):
    """The optimizers as parameters of a test; ``fails`` gives the reasons of those known to fail."""

    def marks(name):
        reason = (fails or {}).get(name)
        is_slow = [pytest.mark.slow] if name.startswith(slow) else []
        return is_slow + ([pytest.mark.xfail(strict=True, reason=reason)] if reason else [])

    return [pytest.param(name, marks=marks(name)) for name in OPTIMIZERS]


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


@pytest.mark.parametrize("name", optimizers())
def test_converges_on_a_parabola(name):
    params, _ = train(OPTIMIZERS[name](), parabola, 1000)
    for leaf in params:
        np.testing.assert_allclose(params[leaf], TARGET[leaf], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", optimizers())
def test_converges_on_rosenbrock(name):
    _, losses = train(OPTIMIZERS[name](), rosenbrock, 5000)
    assert np.isfinite(losses).all()
    print(name, losses[-1] / losses[0])
    assert losses[-1] < losses[0] / 100
