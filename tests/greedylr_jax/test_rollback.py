"""The divergence monitor, and what with_rollback saves and restores."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _rollback, _rule, _window, get_scale
from tests.greedylr_jax.rules import mostly_slow


def follow(losses, monitor=None):
    """The steps at which the snapshot is restored, and the last monitor."""
    monitor = _rollback.monitor_from(jnp.float32(1), jnp.float32(0.01)) if monitor is None else monitor
    monitor, restore = jax.lax.scan(_rollback.observe_loss, monitor, jnp.asarray(losses, jnp.float32))
    return np.flatnonzero(restore).tolist(), monitor


def window_of(losses):
    window = _window.empty_window()
    for loss in losses:
        window = _window.observe(window, jnp.float32(loss))
    return window


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
    assert monitor.threshold == np.inf and _rollback.is_improvement(monitor, window_of([5.0, 5.0]))


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


def floats_but_rates(state):
    """The floating point arrays of an inner state, with zeros in the place of rates."""

    def clear(node):
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            node = node._replace(hyperparams={})
            return jax.tree.map(clear, tuple(node), is_leaf=_rule.is_rate_state)
        return _rule.map_rates(jnp.zeros_like, node)

    def is_leaf(node):
        return _rule.is_rate_state(node) or isinstance(node, optax.InjectStatefulHyperparamsState)

    leaves = jax.tree.leaves(jax.tree.map(clear, state.inner_state, is_leaf=is_leaf))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


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
    # All other floating point numbers are restored to the last bit.
    chex.assert_trees_all_equal(floats_but_rates(restored), floats_but_rates(saved_state))
    before = floats_but_rates(history[10][1])
    assert any((a != b).any() for a, b in zip(before, floats_but_rates(saved_state), strict=True))
    for leaf in floats_but_rates(later_state):
        assert np.isfinite(leaf).all()


def test_each_rollback_to_the_same_snapshot_cuts_again():
    tx = greedylr_jax.with_rollback(greedylr_jax.greedy_lr(window=None), window=2)
    _, state, _ = feed(tx, [2.0, 2.0, 1.0, 0.9, np.nan, 0.9, np.nan, 0.9, np.nan, 0.9])
    assert state.num_rollbacks == 3 and get_scale(state) == 1 / 8


def test_patience_counts_losses_that_are_significantly_higher():
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=4, patience=5)
    # The standard deviation of the second window is 0.08, so the threshold is 1.28.
    calm = [2.0, 2.0, 2.0, 2.0, 1.0, 1.1, 0.9, 1.0]
    assert feed(tx, [*calm, *[1.2] * 40])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 4, 1.2, *[1.4] * 4])[1].num_rollbacks == 0
    assert feed(tx, [*calm, *[1.4] * 5])[1].num_rollbacks == 1
    # The losses have shifted, so there is one rollback and not one after another.
    assert feed(tx, [*calm, *[1.4] * 200])[1].num_rollbacks == 1


def test_a_zero_gradient_restores_the_snapshot_unless_the_loss_is_low():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    dead = jax.tree.map(jnp.zeros_like, START)
    assert feed(tx, [2.0, 2.0, 1.0, 1.0, 1.001, 1.001], grads=dead)[1].num_rollbacks == 1
    assert feed(tx, [2.0, 2.0, 1.0, 1.0, 1.0, 0.5], grads=dead)[1].num_rollbacks == 0
    assert feed(tx, [2.0, 2.0, 1.0, 1.0, 1.001, 1.001])[1].num_rollbacks == 0


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
    assert not train(inner)[-1] < 1e-3 and train(greedylr_jax.with_rollback(inner))[-1] < 1e-3


def test_steps_without_a_loss_do_not_change_the_monitor():
    tx = greedylr_jax.with_rollback(optax.sgd(0.1), window=2)
    state = tx.init(START)
    _, state = tx.update(START, state, START, value=1.0)
    _, after = tx.update(START, state, START, has_value=False)
    chex.assert_trees_all_equal(after.monitor, state.monitor)
    chex.assert_trees_all_equal(after.window, state.window)
    _, after = tx.update(START, state, START, value=jnp.nan, has_value=jnp.array(False))
    assert after.num_rollbacks == 0


def initial(losses):
    """The steps at which a monitor of the initial parameters restores them, and the last monitor."""
    return follow(losses, _rollback.initial_monitor())


def test_a_spike_before_the_first_snapshot_ends_with_a_loss_well_below_the_initial_one():
    spike = [2.4, 26.0, 400.0]
    assert initial([*spike, *[2.3] * 100])[0][0] == 20  # dead at about the initial loss
    assert initial([*spike, *[2.3] * 17, 1.6, *[2.3] * 100])[0] == []
    assert initial([2.4, *[2.3] * 100])[0] == []  # no spike: slow
    assert initial([2.4, *[3.5] * 100])[0] == []
    assert initial([2.4, *[3.7] * 20])[0] == [20]


def test_the_loss_after_restoring_is_another_initial_loss():
    restored, monitor = initial([1.0, *[1.6] * 20, 1.6, *[1.7] * 100])
    assert restored == [20] and monitor.baseline == np.float32(1.6)
    assert initial([np.nan, 3.0])[1].baseline == 3.0


@pytest.mark.parametrize(
    ("losses", "saved"),
    [
        ([2.0, 2.0, 1.91, 1.91], False),  # within the noise floor of 5%
        ([2.0, 2.0, 1.89, 1.89], True),
        ([2.0, 1.0, 2.0, 1.0], False),  # the noise of the losses
        ([2.0, 1.8, 1.6, 1.4], True),
        ([100.0, 0.0, 1.6, 1.4], True),
        ([2.0, 9.0, 0.5, 0.5], True),
        ([2.0, 9.0, 9.0, 1.5], False),
        ([-2.0, -2.0, -2.11, -2.11], True),
        ([-2.0, -2.0, -2.09, -2.09], False),
    ],
)
def test_the_first_snapshot_needs_a_loss_significantly_below_the_initial_one(losses, saved):
    _, state, _ = feed(greedylr_jax.with_rollback(optax.sgd(0.1), window=2), losses)
    assert (state.snapshot.params["w"] == START["w"]).all() != saved
    assert state.monitor.is_initial != saved


def test_constant_losses_that_rise_by_less_than_5_percent_are_not_bad():
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=2, patience=3)
    constant = [2.0, 2.0, 1.0, 1.0]
    assert feed(tx, [*constant, *[1.04] * 50])[1].num_rollbacks == 0
    assert feed(tx, [*constant, *[1.06] * 3])[1].num_rollbacks == 1


def test_one_outlier_does_not_hide_a_divergence():
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=20, patience=20)
    calm = [2.0] * 20 + [1.0, 1.1, 0.9] * 6 + [50.0, 1.0]
    assert feed(tx, calm)[1].monitor.threshold < 2
    assert feed(tx, [*calm, *[5.0] * 20])[1].num_rollbacks == 1


def test_the_baseline_follows_losses_that_drift():
    """They rise by 8% in 100 windows; a baseline of the first windows would call the last ones bad."""
    tx = greedylr_jax.with_rollback(optax.sgd(0.0), window=2, patience=5)
    losses = np.concatenate([[2.0, 2.0], np.linspace(1.0, 1.08, 200)])
    _, state, _ = feed(tx, losses)
    assert state.num_rollbacks == 0 and state.monitor.baseline > 1.03


def quadratic(params):
    return sum(jnp.sum(jnp.square(leaf - 1)) for leaf in jax.tree.leaves(params))


def train(tx, steps=1000, every=50, hit=("w", "b"), nan_loss=False):
    """Trains on a quadratic; each ``every``-th batch has NaN gradients in the leaves of ``hit``."""
    tx = optax.with_extra_args_support(tx)

    def body(carry, is_bad):
        params, state = carry
        loss, grads = jax.value_and_grad(quadratic)(params)
        grads |= {name: jnp.where(is_bad, jnp.nan, grads[name]) for name in hit}
        loss = jnp.where(is_bad & nan_loss, jnp.nan, loss)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    is_bad = np.arange(steps) % every == every - 1
    (params, state), _ = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), is_bad))(START)
    return quadratic(params), state


def cosine(steps):
    return optax.cosine_decay_schedule(0.02, steps)


WITH_SCHEDULES = {
    "adamw": (lambda: optax.adamw(cosine(1000)), 1000),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.adamw)(cosine(1000)), 1000),
    "MultiSteps": (lambda: optax.MultiSteps(optax.adamw(cosine(500)), 2), 500),
    "multi_steps": (lambda: greedylr_jax.multi_steps(optax.adamw(cosine(500)), 2), 500),
}


@pytest.mark.parametrize("name", mostly_slow(WITH_SCHEDULES, *list(WITH_SCHEDULES)[:2]))
@pytest.mark.parametrize("nan_loss", [False, True], ids=["finite loss", "NaN loss"])
def test_bad_batches_cost_a_step_and_no_count(name, nan_loss):
    make, count = WITH_SCHEDULES[name]
    loss, state = train(greedylr_jax.with_rollback(make()), nan_loss=nan_loss)
    clean, _ = train(make() if name != "MultiSteps" else make().gradient_transformation(), every=10**6)
    counts = optax.tree.get_all_with_path(state.inner_state, "count")
    assert counts and all(number == count for _, number in counts)
    assert loss < 2 * clean + 1e-6
    assert state.num_skipped == 20 and state.num_rollbacks == 0


@pytest.mark.parametrize("hit", [("w",), ("b",), ("w", "b")])
@pytest.mark.parametrize("inner", mostly_slow(["adam", "momentum", "adagrad", "lbfgs"], "adam"))
def test_one_nan_gradient_stops_no_leaf(hit, inner):
    optimizers = {
        "adam": optax.adam(0.02),
        "momentum": optax.sgd(0.01, momentum=0.9),
        "adagrad": optax.adagrad(0.5),
        "lbfgs": optax.lbfgs(0.1, linesearch=None),
    }
    loss, state = train(greedylr_jax.with_rollback(optimizers[inner]), steps=500, every=251, hit=hit)
    assert loss < 1e-3
    assert state.num_skipped == 1 and state.num_rollbacks == 0


def test_steps_that_stay_non_finite_restore_the_snapshot():
    tx = greedylr_jax.with_rollback(optax.adam(0.1), window=2, patience=4)
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, START)
    assert feed(tx, [1.0] * 3, grads=nan)[1].num_rollbacks == 0
    _, state, _ = feed(tx, [1.0] * 4, grads=nan)
    assert state.num_rollbacks == 1 and state.num_skipped == 3
    _, state, _ = feed(tx, [np.nan, 1.0], grads=nan)
    assert state.num_rollbacks == 0
    _, state, _ = feed(tx, [np.nan, np.nan], grads=nan)
    assert state.num_rollbacks == 1


def test_after_a_restore_counts_continue_and_moments_do_not():
    tx = greedylr_jax.with_rollback(optax.adam(0.01), window=2)
    _, _, history = feed(tx, [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0])
    saved, restored = history[3][1].inner_state[0], history[6][2].inner_state[0]
    assert saved.count == 3 and restored.count == 7
    chex.assert_trees_all_equal((restored.mu, restored.nu), (saved.mu, saved.nu))


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


@pytest.mark.filterwarnings("ignore::greedylr_jax.MisplacedRuleWarning")
def test_rules_inside_are_read_and_checked_as_without_it():
    right = greedylr_jax.with_rollback(greedylr_jax.chain(greedylr_jax.greedy_lr(), optax.adam(0.1)))
    greedylr_jax.assert_controls_learning_rate(right, START)
    assert greedylr_jax.metrics(right.init(START))["scale"] == 1
    wrong = greedylr_jax.with_rollback(optax.chain(greedylr_jax.greedy_lr(), optax.adam(0.1)))
    with pytest.raises(AssertionError, match=r"opt_state.inner_state\[0\] does not control the step size"):
        greedylr_jax.assert_controls_learning_rate(wrong, START)
