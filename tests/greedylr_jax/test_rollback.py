"""When to go back, and that what is kept is come back to, to the last bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _rollback, _rule, get_scale


def follow(losses, state=None):
    """The steps at which the way is back, and the last state."""
    state = _rollback.watch_from(jnp.float32(1), jnp.float32(0.01)) if state is None else state
    state, returns = jax.lax.scan(_rollback.watch, state, jnp.asarray(losses, jnp.float32))
    return np.flatnonzero(returns).tolist(), state


LIMIT = 1 + 6 * np.sqrt(0.01 / 3)


def test_twenty_bad_losses_in_a_row_are_a_way_back_and_nineteen_are_not():
    high = [LIMIT + 0.01] * 19
    assert follow([*high, 1.0, *high])[0] == []
    assert follow([1.0, *high, np.nan])[0] == [20]
    assert follow([LIMIT - 0.01] * 100)[0] == []
    assert follow([np.inf] * 20)[0] == [19]


def test_where_a_return_changes_nothing_the_losses_of_old_are_forgotten():
    returns, state = follow([5.0] * 100)
    assert returns == [19]  # once, and not for ever
    assert state.limit == np.inf and _rollback.improves(state, jnp.float32(5.0))


def test_where_a_return_helped_there_may_be_another():
    assert follow(([5.0] * 20 + [1.0]) * 3)[0] == [19, 40, 61]


def test_going_there_and_back_loses_no_bit():
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.standard_normal(1000), jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    far = jax.tree.map(lambda x: (x * 1e6 + 7).astype(x.dtype), start)
    kept, params, settles = _rollback.Kept(start, None), far, jnp.asarray(False)
    steps = jax.tree.map(jnp.zeros_like, start)
    for turn in range(_rollback.SETTLING_STEPS + 1):
        updates, inner, kept, settles = _rollback.exchange(
            steps,
            jnp.float32(3),
            kept,
            params=params,
            old_inner_state=jnp.float32(3),
            needed=jnp.asarray(True),
            goes_back=jnp.asarray(turn == 0),
            settles=settles,
            takes=jnp.asarray(False),
            init=lambda params: jnp.float32(0),
        )
        if not settles:
            break
        assert inner == 0  # a fresh optimizer
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    assert not settles and _rollback.are_equal(params, start)


def test_nothing_is_done_where_nothing_is_needed():
    no = jnp.asarray(False)
    updates, inner, kept, returns = _rollback.exchange(
        jnp.array([jnp.inf]),
        jnp.float32(3),
        _rollback.Kept(jnp.zeros(1), jnp.float32(1)),
        params=jnp.ones(1),
        old_inner_state=jnp.float32(2),
        needed=no,
        goes_back=no,
        settles=no,
        takes=jnp.asarray(True),
    )
    assert updates[0] == jnp.inf and inner == 3 and kept.inner_state == 1 and not returns


START = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}


def feed(tx, losses, params=START, grads=None, **extra):
    """Steps through losses; yields parameters before each step, and the states after it."""
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
        "hypergradient": greedylr_jax.hypergradient(optax.trace(0.9), 0.01, 1e-4),
    }


@pytest.mark.parametrize("name", inner_optimizers())
def test_a_loss_that_is_not_finite_leads_back_to_the_best_window_at_a_lower_rate(name):
    tx = greedylr_jax.with_rollback(inner_optimizers()[name], window=3, cut_factor=0.25)
    # Windows end at the third, sixth and ninth loss; the second is the best.
    losses = [5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 3.0, 3.5, 3.0, 2.5, np.nan, 1.0, 1.0]
    _, state, history = feed(tx, losses)
    assert state.num_rollbacks == 1
    kept_params, kept_state, _ = history[5]
    back_params, _, back_state = history[11]
    chex.assert_trees_all_equal(back_params, kept_params)
    _, _, returned = history[10]
    was = greedylr_jax.get_learning_rate(kept_state.inner_state, 1.0)
    last = greedylr_jax.get_learning_rate(history[10][1].inner_state, 1.0)
    now = greedylr_jax.get_learning_rate(returned, 1.0)
    np.testing.assert_allclose(now, 0.25 * min(was, last), rtol=1e-6)
    # All but the rates is what it was, to the last bit.
    same = lambda state: jax.tree.map(  # noqa: E731
        lambda node: _rule.map_rates(jnp.zeros_like, node), state.inner_state, is_leaf=_rule.is_rate_state
    )
    chex.assert_trees_all_equal(same(returned), same(kept_state))
    assert np.isfinite(jax.tree.leaves(back_state)[0]).all()


def test_each_return_to_the_same_place_cuts_again():
    tx = greedylr_jax.with_rollback(greedylr_jax.greedy_lr(window=None), window=2)
    _, state, _ = feed(tx, [1.0, 0.9, np.nan, 0.9, np.nan, 0.9, np.nan, 0.9])
    assert state.num_rollbacks == 3 and get_scale(state) == 1 / 8


def test_patience_counts_losses_that_are_significantly_higher():
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=4, patience=5)
    calm = [1.0, 1.1, 0.9, 1.0]  # 0.08 is their deviation, so that 1.28 is the limit
    assert feed(tx, [*calm, *[1.2] * 40])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 4, 1.2, *[1.4] * 4])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 5])[1].num_rollbacks == 1
    # The parameters were not at fault, so there is one return and not one after the other.
    assert feed(tx, [*calm, *[1.4] * 200])[1].num_rollbacks == 1


def test_a_gradient_that_has_died_is_a_way_back_unless_nothing_is_left_to_learn():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    dead = jax.tree.map(jnp.zeros_like, START)
    assert feed(tx, [1.0, 1.0, 1.001, 1.001], grads=dead)[1].num_rollbacks == 1
    assert feed(tx, [1.0, 1.0, 1.0, 0.5], grads=dead)[1].num_rollbacks == 0
    assert feed(tx, [1.0, 1.0, 1.001, 1.001])[1].num_rollbacks == 0


def test_a_training_that_a_single_bad_batch_destroys_is_saved():
    """A gradient 1e30 times too large, once; without the way back nothing is learnt any more."""

    def train(tx):
        tx = optax.with_extra_args_support(tx)

        def body(carry, blow):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))(params)
            updates, state = tx.update(jax.tree.map(lambda g: g * blow, grads), state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        blows = jnp.ones(300).at[150].set(1e30)
        return jax.lax.scan(body, (START, tx.init(START)), blows)[1]

    inner = greedylr_jax.chain(optax.adagrad(0.3), greedylr_jax.greedy_lr())
    # With AdaGrad the accumulator keeps the blow, and no step is taken any more; the parameters are far off.
    bare = train(optax.sgd(0.1))
    saved = train(greedylr_jax.with_rollback(optax.sgd(0.1)))
    assert not bare[-1] < 1e-3 and saved[-1] < 1e-6
    assert train(greedylr_jax.with_rollback(inner))[-1] < 1e-3


def test_steps_without_a_loss_change_nothing_of_the_watch():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    state = tx.init(START)
    _, state = tx.update(START, state, START, value=1.0)
    _, after = tx.update(START, state, START, has_value=False)
    chex.assert_trees_all_equal(after.watch, state.watch)
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
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        greedylr_jax.with_rollback(optax.sgd(0.1), **arguments)


def test_a_call_without_parameters_or_loss_shows_the_right_one():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"needs the parameters.*tx.update"):
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
