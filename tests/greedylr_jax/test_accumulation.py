"""multi_steps as a drop-in for optax.MultiSteps, and the losses that rules inside observe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from tests.greedylr_jax.rules import mostly_slow

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4), "b": jnp.ones(2)}


def run(tx, steps=9, bad=()):
    """Parameters and states after each of a few micro-batches, of which ``bad`` have NaN gradients."""
    params, state, history = PARAMS, tx.init(PARAMS), []
    keys = jax.random.split(jax.random.key(0), steps)
    for step, key in enumerate(keys):
        grads = jax.tree.map(lambda leaf, key=key: leaf + jax.random.normal(key, leaf.shape), params)
        if step in bad:
            grads = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
        updates, state = tx.update(grads, state, params, value=float(step))
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


CASES = {
    "every 3": dict(every_k_schedule=3),
    "schedule": dict(every_k_schedule=lambda step: 1 + step % 3),
    "sum": dict(every_k_schedule=2, use_grad_mean=False),
    "skip": dict(every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite),
    "skip large": dict(
        every_k_schedule=3,
        should_skip_update_fn=functools.partial(optax.skip_large_updates, max_squared_norm=9.0),
    ),
    "bfloat16": dict(every_k_schedule=3, accumulator_dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, "schedule", "skip"))
def test_multi_steps_equals_optax(case):
    settings = CASES[case]
    bad = (1, 5) if case == "skip" else ()
    ours = greedylr_jax.multi_steps(optax.adam(0.1), **settings)
    theirs = optax.MultiSteps(optax.adam(0.1), **settings)
    history = run(ours, bad=bad)
    for (params, state), (expected_params, expected) in zip(history, run(theirs, bad=bad), strict=True):
        for name in ("w", "b"):
            np.testing.assert_allclose(params[name], expected_params[name], rtol=1e-6)
        for name in optax.MultiStepsState._fields:
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
                getattr(state, name),
                getattr(expected, name),
            )
        assert ours.has_updated(state) == theirs.has_updated(expected)
    assert any(ours.has_updated(state) for _, state in history)
    assert ours.gradient_transformation() is ours


def test_skipped_micro_batches_are_not_observed():
    rule = greedylr_jax.greedy_lr(patience=0, window=None)
    tx = greedylr_jax.multi_steps(rule, 2, should_skip_update_fn=optax.skip_not_finite)
    _, state = run(tx, steps=3, bad=(1,))[-1]
    assert greedylr_jax.metrics(state)["best_value"] == 1.0  # the mean of 0 and 2


def test_a_nan_between_optimizer_steps_does_not_reach_the_updates():
    """optax.MultiSteps multiplies by zero, which leaves NaN."""
    params, _ = run(greedylr_jax.multi_steps(optax.sgd(0.1), 3), steps=2, bad=(0,))[-1]
    assert np.isfinite(params["w"]).all()


@pytest.mark.parametrize("k", [0, -1, 1.5, "two"])
def test_a_wrong_number_of_micro_batches_is_rejected(k):
    with pytest.raises(ValueError, match="every_k_schedule must be an integer in"):
        greedylr_jax.multi_steps(optax.sgd(0.1), k)


def test_a_wrong_skip_function_is_rejected():
    tx = greedylr_jax.multi_steps(optax.sgd(0.1), 2, should_skip_update_fn=lambda *_: (jnp.ones(()), ()))
    with pytest.raises(ValueError, match="should_skip_update_fn must return a boolean scalar array"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)


def test_devices_average_losses_and_skip_together():
    """Each device has its own losses and gradients; one of four has a NaN at the second micro-batch."""
    rule = greedylr_jax.greedy_lr(patience=0, window=None)
    tx = greedylr_jax.multi_steps(
        optax.chain(optax.sgd(1.0), rule), 2, should_skip_update_fn=optax.skip_not_finite, axis_name="device"
    )

    def device(losses, factors):
        def body(state, inputs):
            loss, factor = inputs
            _, state = tx.update(jnp.ones(3) * factor, state, jnp.ones(3), value=loss)
            return state, None

        state, _ = jax.lax.scan(body, tx.init(jnp.ones(3)), (losses, factors))
        return state.mini_step, state.gradient_step, greedylr_jax.metrics(state)["best_value"]

    losses = jnp.arange(12.0).reshape(4, 3)
    factors = jnp.ones((4, 3)).at[2, 1].set(jnp.nan)
    mini_steps, gradient_steps, best = jax.vmap(device, axis_name="device")(losses, factors)
    assert mini_steps.tolist() == [0] * 4 and gradient_steps.tolist() == [1] * 4
    assert best.tolist() == [losses[:, [0, 2]].mean()] * 4
