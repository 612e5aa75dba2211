"""A small training run for the tests of devices: every setting must give the same rates."""

import jax
import jax.numpy as jnp
import optax

import greedylr_jax

STEPS, BATCH, FEATURES, HIDDEN = 30, 32, 8, 16
OPTIMIZER_SETTINGS = dict(factor=0.5, patience=1, window=4)


def optimizer(**options):
    return optax.chain(optax.adam(0.02), greedylr_jax.greedy_lr(**OPTIMIZER_SETTINGS, **options))


def data():
    """Inputs and targets of all steps, shapes (steps, batch, features) and (steps, batch)."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (STEPS, BATCH, FEATURES))
    return x, jnp.sin(x.sum(axis=-1)) + 0.3 * jax.random.normal(keys[1], (STEPS, BATCH))


def init_params():
    keys = jax.random.split(jax.random.key(2))
    return {
        "hidden": jax.random.normal(keys[0], (FEATURES, HIDDEN)) / 3,
        "out": jax.random.normal(keys[1], (HIDDEN,)) / 4,
    }


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)


def make_step(tx, average=lambda tree: tree):
    """A training step; ``average`` combines gradients (and nothing else) across devices."""

    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(average(grads), state, params, value=loss)
        return optax.apply_updates(params, updates), state, greedylr_jax.get_scale(state)

    return step


def train(step, params, state, x, y):
    scales = []
    for batch_x, batch_y in zip(x, y, strict=True):
        params, state, scale = step(params, state, batch_x, batch_y)
        scales.append(float(scale))
    return params, scales


def single_device_run():
    tx = optimizer()
    params = init_params()
    return train(jax.jit(make_step(tx)), params, tx.init(params), *data())
