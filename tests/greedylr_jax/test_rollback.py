"""The divergence monitor, and what with_rollback saves and restores."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _rollback, _rule, get_scale


def follow(losses, monitor=None):
    """The steps at which the snapshot is restored, and the last monitor."""
    monitor = _rollback.monitor_from(jnp.float32(1), jnp.float32(0.01)) if monitor is None else monitor
    monitor, restore = jax.lax.scan(_rollback.observe_loss, monitor, jnp.asarray(losses, jnp.float32))
    return np.flatnonzero(restore).tolist(), monitor


THRESHOLD = 1 + 6 * np.sqrt(0.01 / 3)


def test_twenty_consecutive_bad_losses_restore_and_nineteen_do_not():
    high = [THRESHOLD + 0.01] * 19
    assert follow([*high, 1.0, *high])[0] == []
    assert follow([1.0, *high, np.nan])[0] == [20]
    assert follow([THRESHOLD - 0.01] * 100)[0] == []
    assert follow([np.inf] * 20)[0] == [19]


def test_the_baseline_is_reset_if_restoring_does_not_help():
    restored, monitor = follow([5.0] * 100)
    assert restored == [19]  # once, and not every 20 steps
    assert monitor.threshold == np.inf and _rollback.is_improvement(monitor, jnp.float32(5.0))


def test_restoring_repeats_if_it_helped():
    assert follow(([5.0] * 20 + [1.0]) * 3)[0] == [19, 40, 61]


START = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}


def feed(tx, losses, params=START, grads=None, **extra):
    """Steps through losses; the history has parameters and state before each step, and the state after."""
    state, history = tx.init(params), []
    step = jax.jit(tx.update)
    for loss in losses:
        updates, after = step(params if grads is None else grads, state, params, value=loss, **extra)
        history.append((params, state, after))
        params, state = optax.apply_updates(params, updates), after
    return params, state, history


def inner_optimizers():
    return {
        "sgd and greedy_lr": greedylr_jax.chain(optax.sgd(0.1, momentum=0.9), greedylr_jax.greedy_lr()),
        "adam and trend_lr": greedylr_jax.chain(greedylr_jax.trend_lr(), optax.adam(0.01)),
        "schedule": optax.inject_hyperparams(optax.adam)(
            learning_rate=greedylr_jax.greedy_lr_schedule(0.01, min_learning_rate=1e-3, max_learning_rate=0.1)
        ),
        "hypergradient": greedylr_jax.hypergradient(optax.sgd(1.0, momentum=0.9), 0.01, 1e-4),
    }


@pytest.mark.parametrize("name", inner_optimizers())
def test_a_non_finite_loss_restores_the_best_window_at_a_lower_rate(name):
    tx = greedylr_jax.with_rollback(inner_optimizers()[name], window=3, cut_factor=0.25)
    # Windows end at the third, sixth and ninth loss; the second is the best.
    losses = [5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 3.0, 3.5, 3.0, 2.5, np.nan, 1.0, 1.0]
    _, state, history = feed(tx, losses)
    assert state.num_rollbacks == 1
    saved_params, saved_state, _ = history[5]
    restored_params, _, later_state = history[11]
    chex.assert_trees_all_equal(restored_params, saved_params)
    _, _, restored = history[10]
    saved_rate = greedylr_jax.get_learning_rate(saved_state.inner_state, 1.0)
    last_rate = greedylr_jax.get_learning_rate(history[10][1].inner_state, 1.0)
    rate = greedylr_jax.get_learning_rate(restored, 1.0)
    np.testing.assert_allclose(rate, 0.25 * min(saved_rate, last_rate), rtol=1e-6)
    # Everything else is restored to the last bit.
    same = lambda state: jax.tree.map(  # noqa: E731
        lambda node: _rule.map_rates(jnp.zeros_like, node), state.inner_state, is_leaf=_rule.is_rate_state
    )
    chex.assert_trees_all_equal(same(restored), same(saved_state))
    assert np.isfinite(jax.tree.leaves(later_state)[0]).all()


def test_each_rollback_to_the_same_snapshot_cuts_again():
    tx = greedylr_jax.with_rollback(greedylr_jax.greedy_lr(window=None), window=2)
    _, state, _ = feed(tx, [1.0, 0.9, np.nan, 0.9, np.nan, 0.9, np.nan, 0.9])
    assert state.num_rollbacks == 3 and get_scale(state) == 1 / 8


def test_patience_counts_losses_that_are_significantly_higher():
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=4, patience=5)
    calm = [1.0, 1.1, 0.9, 1.0]  # their standard deviation is 0.08, so the threshold is 1.28
    assert feed(tx, [*calm, *[1.2] * 40])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 4, 1.2, *[1.4] * 4])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 5])[1].num_rollbacks == 1
    # The losses have shifted, so there is one rollback and not one after another.
    assert feed(tx, [*calm, *[1.4] * 200])[1].num_rollbacks == 1


def test_a_zero_gradient_restores_the_snapshot_unless_the_loss_is_low():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    dead = jax.tree.map(jnp.zeros_like, START)
    assert feed(tx, [1.0, 1.0, 1.001, 1.001], grads=dead)[1].num_rollbacks == 1
    assert feed(tx, [1.0, 1.0, 1.0, 0.5], grads=dead)[1].num_rollbacks == 0
    assert feed(tx, [1.0, 1.0, 1.001, 1.001])[1].num_rollbacks == 0


def test_with_rollback_saves_a_training_from_a_single_bad_batch():
    """One gradient is 1e30 times too large; a bare optimizer never recovers from it."""

    def train(tx):
        tx = optax.with_extra_args_support(tx)

        def body(carry, factor):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))(params)
            updates, state = tx.update(jax.tree.map(lambda g: g * factor, grads), state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        factors = jnp.ones(300).at[150].set(1e30)
        return jax.lax.scan(body, (START, tx.init(START)), factors)[1]

    inner = greedylr_jax.chain(optax.adagrad(0.3), greedylr_jax.greedy_lr())
    # The accumulator of AdaGrad holds the gradient for good, so its steps become zero.
    bare = train(optax.sgd(0.1))
    saved = train(greedylr_jax.with_rollback(optax.sgd(0.1)))
    assert not bare[-1] < 1e-3 and saved[-1] < 1e-6
    assert train(greedylr_jax.with_rollback(inner))[-1] < 1e-3


def test_steps_without_a_loss_do_not_change_the_monitor():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    state = tx.init(START)
    _, state = tx.update(START, state, START, value=1.0)
    _, after = tx.update(START, state, START, has_value=False)
    chex.assert_trees_all_equal(after.monitor, state.monitor)
    chex.assert_trees_all_equal(after.window, state.window)
    _, after = tx.update(START, state, START, value=jnp.nan, has_value=jnp.array(False))
    assert after.num_rollbacks == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window must be an integer in"),
        ({"window": 2**24 + 1}, r"window must be an integer in \[2, 16777216\]"),
        ({"patience": 0}, "patience must be an integer in"),
        ({"cut_factor": 0.0}, r"cut_factor must be a number in \(0, 1\], got 0.0"),
        ({"cut_factor": 1.5}, "cut_factor must be"),
    ],
)
def test_numbers_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        greedylr_jax.with_rollback(optax.sgd(0.1), **arguments)


def test_a_call_without_parameters_or_loss_shows_the_right_call():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"requires `params`.*tx.update"):
        tx.update(START, tx.init(START), value=1.0)
    with pytest.raises(TypeError, match="with_rollback needs the loss"):
        tx.update(START, tx.init(START), START)


def test_rules_inside_are_read_and_checked_as_without_it():
    right = greedylr_jax.with_rollback(greedylr_jax.chain(greedylr_jax.greedy_lr(), optax.adam(0.1)))
    greedylr_jax.assert_controls_learning_rate(right, START)
    assert greedylr_jax.metrics(right.init(START))["scale"] == 1
    wrong = greedylr_jax.with_rollback(optax.chain(greedylr_jax.greedy_lr(), optax.adam(0.1)))
    with pytest.raises(AssertionError, match=r"opt_state.inner_state\[0\] does not control the step size"):
        greedylr_jax.assert_controls_learning_rate(wrong, START)
