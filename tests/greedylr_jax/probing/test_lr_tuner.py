"""LRTuner: proposals on quadratics, the two phases, saturation, and rollbacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedylr_jax import get_learning_rate, lr_tuner

CURVATURES = jnp.array([0.3, 1.0, 4.0, 9.0])
START = {"w": jnp.array([1.0, -2.0, 0.5, 1.5])}
ENOUGH = 1e6  # an epsilon threshold that never binds


def quadratic(params):
    return 0.5 * jnp.sum(CURVATURES * params["w"] ** 2)


def bowl(params):
    """The same curvature everywhere: along every gradient the best rate is 1/2."""
    return jnp.sum(params["w"] ** 2)


def make_step(tx, loss_fn=quadratic, superbatch=lambda p, params, kind: quadratic(p)):
    """A compiled step; ``superbatch`` makes the superbatch's loss from the parameters before the step."""

    @jax.jit
    def step(params, state, value_scale=1.0, kind=0.0):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=loss * value_scale,
            value_fn=lambda p: superbatch(p, params, kind),
        )
        return optax.apply_updates(params, updates), state

    return step


def line_minimiser(params, direction):
    slope = np.sum(np.asarray(CURVATURES * params["w"] * direction["w"], float))
    return slope / np.sum(np.asarray(CURVATURES * direction["w"] ** 2, float))


METHODS = {
    "taylor": {"method": "taylor"},
    "3 points": {},
    "5 points": {"num_samples": 5},
    "4 points, narrow": {"num_samples": 4, "probe_width": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "inner",
    [optax.sgd(1.0), optax.sgd(1.0, momentum=0.9), optax.adam(1.0)],
    ids=["sgd", "momentum", "adam"],
)
def test_the_proposed_rate_is_the_minimiser_along_the_line(method, inner):
    """From rates too low in the explore phase, and from rates too high in the exploit phase."""
    loss, gradient = jax.value_and_grad(quadratic)(START)
    unit_step, _ = inner.update(gradient, inner.init(START), START)
    direction = jax.tree.map(jnp.negative, unit_step)
    best = line_minimiser(START, direction)

    @jax.jit
    def first_step(rate, explore_steps):  # both traced: one compilation for all
        tx = lr_tuner(
            inner,
            rate,
            explore_steps=explore_steps,
            recompute_every=1,
            epsilon_threshold=ENOUGH,
            **METHODS[method],
        )
        state = tx.init(START)
        # A loss that has stopped dropping, so that the rate may fall.
        stalled = state.progress._replace(first_drop=jnp.ones(()), last_mean=loss)
        updates, state = tx.update(
            gradient, state._replace(progress=stalled), START, value=loss, value_fn=quadratic
        )
        return get_learning_rate(state), optax.apply_updates(START, updates)

    for fraction in (0.1, 0.5, 0.9, 1.2, 2.0, 10.0):
        rate, params = first_step(fraction * best, 10 if fraction < 1 else 0)
        np.testing.assert_allclose(rate, best, rtol=1e-4, err_msg=f"from {fraction} times the best")
        moved = jax.tree.map(lambda p, d: p - best * d, START, direction)
        np.testing.assert_allclose(params["w"], moved["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_change_of_rate_is_bounded_by_equation_3(method):
    tx = lr_tuner(
        optax.sgd(1.0), 1e-3, explore_steps=10, recompute_every=1, epsilon_threshold=1e-9, **METHODS[method]
    )
    _, state = make_step(tx)(START, tx.init(START))
    bound = np.cbrt(1e-9 * float(quadratic(START)))
    np.testing.assert_allclose(get_learning_rate(state), 1e-3 + bound, rtol=1e-5)


def test_on_a_concave_loss_the_rate_moves_downhill_to_the_bound():
    def hill(params):
        return 10 - jnp.sum(params["w"] ** 2)

    up = lr_tuner(optax.sgd(1.0), 0.1, explore_steps=9, recompute_every=1, epsilon_threshold=1e-3)
    _, state = make_step(up, hill, lambda p, params, kind: hill(p))(START, up.init(START))
    np.testing.assert_allclose(get_learning_rate(state), 0.1 + np.cbrt(1e-3 * float(hill(START))), rtol=1e-5)


def run(tx, steps, noise=0.0):
    """Rates of a run on the quadratic; with ``noise`` losses are off, and superbatches are shifted."""
    shifted = make_step(tx, superbatch=lambda p, params, shift: quadratic({"w": p["w"] - shift}))
    params, state = START, tx.init(START)
    generator = np.random.default_rng(0)
    rates = [get_learning_rate(state)]
    for _ in range(steps):
        params, state = shifted(
            params, state, 1 + noise * generator.standard_normal(), noise * generator.standard_normal(4)
        )
        rates.append(get_learning_rate(state))
    return np.array(rates)


@pytest.mark.parametrize("rate", [0.003, 0.05, 0.2])
@pytest.mark.parametrize("method", ["fit", "taylor"])
def test_explore_never_lowers_the_rate_and_exploit_never_raises_it(rate, method):
    settings = dict(recompute_every=3, saturation_threshold=1.0, method=method, rollback=False)
    tx = lr_tuner(optax.sgd(1.0, momentum=0.5), rate, explore_steps=30, epsilon_threshold=1e-4, **settings)
    changes = np.diff(run(tx, 90, noise=0.5))
    assert (changes[:30] >= 0).all() and (changes[30:] <= 0).all()
    assert (changes[:30] > 0).any() and (changes[30:] < 0).any()


def test_the_rate_changes_only_at_the_end_of_a_window():
    tx = lr_tuner(optax.sgd(1.0), 1e-3, explore_steps=50, recompute_every=7, epsilon_threshold=1e-9)
    assert np.flatnonzero(np.diff(run(tx, 40))).tolist() == [6, 13, 20, 27, 34]


def test_value_fn_is_evaluated_only_where_the_rate_may_change():
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic(params)

    tx = lr_tuner(optax.sgd(1.0), 1e-3, explore_steps=100, recompute_every=5, num_samples=4)
    step = jax.jit(
        lambda params, state: tx.update(
            jax.grad(quadratic)(params), state, params, value=quadratic(params), value_fn=counted
        )
    )
    params, state = START, tx.init(START)
    for _ in range(14):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    assert len(calls) == 2 * 4


def decaying(drops):
    """Losses of windows of one step that drop by these amounts."""
    return 100 - np.concatenate([[0.0], np.cumsum(drops)])


@pytest.mark.parametrize(
    ("drops", "falls_after"),
    [
        # Window 0 has no drop; window 1 has the first drop, 8; relative threshold 4: below 2 is saturated.
        ([8, 4, 2.5, 2.1, 1.5, 2.0, 1.0], [5, 7]),
        # After the crossing at 1.5, 1.5 is the threshold, whatever the first drop of the next rate.
        ([8, 1.5, 20, 10, 6, 1.6, 1.4], [2, 7]),
        # A loss that rises is saturated; the absolute threshold is then 0.
        ([8, -1, 9, 3, 0.5, -0.1], [2, 6]),
    ],
)
def test_exploit_waits_for_saturation_relative_first_and_absolute_then(drops, falls_after):
    tx = lr_tuner(
        optax.sgd(1.0),
        10.0,
        explore_steps=0,
        recompute_every=1,
        saturation_threshold=4.0,
        epsilon_threshold=1e-3,
        rollback=False,
    )
    state = tx.init(START)
    update = jax.jit(lambda state, value: tx.update(START, state, START, value=value, value_fn=bowl)[1])
    fell = []
    for index, value in enumerate(decaying(drops)):
        before = float(get_learning_rate(state))
        state = update(state, jnp.float32(value))
        if float(get_learning_rate(state)) < before:
            fell.append(index)
    assert fell == falls_after


def _planted(p, params, kind):
    """A constant loss, or (``kind`` 1) a loss that decreases with every increase of the rate."""
    return -kind * sum(jnp.sum((a - b) ** 2) for a, b in zip(p.values(), params.values(), strict=True))


@pytest.mark.parametrize("inner", [optax.sgd(1.0, momentum=0.5), optax.adam(1.0)], ids=["momentum", "adam"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_bad_superbatch_is_rolled_back_once_to_the_last_bit(inner, every):
    rate = np.float32(0.01)
    tx = lr_tuner(inner, rate, explore_steps=500, recompute_every=every, epsilon_threshold=50.0)
    step = make_step(tx, superbatch=_planted)
    params, state = START, tx.init(START)
    planted = 3 * every - 1  # the last step of the third window
    history, restored = [], None
    for index in range(12 * every):
        history.append((params, state))
        params, state = step(params, state, 1.0, float(index == planted))
        if index < planted:
            assert get_learning_rate(state) == rate
        if index == planted:
            assert get_learning_rate(state) > 100 * rate
        if restored is None and state.num_rollbacks and not _is_restoring(state, params):
            restored = index
            before = history[planted]
            chex.assert_trees_all_equal(params, before[0])
            chex.assert_trees_all_equal(floats(state.inner_state), floats(before[1].inner_state))
            counts = optax.tree.get_all_with_path(state.inner_state, "count")
            assert all(count == index + 1 for _, count in counts)  # counts continue
            assert get_learning_rate(state) == get_learning_rate(before[1])
    assert restored is not None and restored <= planted + every + 3
    assert state.num_rollbacks == 1
    assert get_learning_rate(state) == rate
    assert quadratic(params) < quadratic(history[planted][0])


def floats(state):
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _is_restoring(state, params):
    return any(
        np.any(here != there)
        for here, there in zip(jax.tree.leaves(params), jax.tree.leaves(state.snapshot.params), strict=True)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounding_does_not_keep_a_rollback_from_its_snapshot(dtype):
    """The parameters differ from the snapshot by orders of magnitude and in sign."""
    generator = np.random.default_rng(0)
    saved = jnp.asarray(generator.standard_normal(4096) * 10.0 ** generator.integers(-8, 3, 4096), dtype)
    diverged = jnp.asarray(generator.standard_normal(4096) * 10.0 ** generator.integers(-3, 9, 4096), dtype)
    tx = lr_tuner(optax.sgd(1.0), 0.1, explore_steps=9, recompute_every=2)
    state = tx.init(saved)
    state = state._replace(change=state.change._replace(is_pending=jnp.asarray(True)))
    params, update = diverged, jax.jit(tx.update, static_argnames="value_fn")
    for _ in range(4):
        updates, state = update(params, state, params, value=jnp.inf, value_fn=jnp.sum)
        if np.array_equal(params, saved):
            break
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, saved)
    assert state.num_rollbacks == 1


def test_a_loss_that_is_not_finite_is_rolled_back_at_once():
    tx = lr_tuner(optax.sgd(1.0), 0.01, explore_steps=99, recompute_every=10, epsilon_threshold=ENOUGH)
    step = make_step(tx)
    params, state = START, tx.init(START)
    for index in range(20):
        if index == 9:
            before = params
        params, state = step(params, state, jnp.nan if index == 12 else 1.0)
        assert state.num_rollbacks == (index >= 12)
        if index == 12:
            np.testing.assert_allclose(params["w"], before["w"], rtol=1e-6)
            assert get_learning_rate(state) == np.float32(0.01)


def test_non_finite_losses_do_not_propagate():
    for rollback in (False, True):
        tx = lr_tuner(optax.sgd(1.0), 0.01, explore_steps=9, recompute_every=2, rollback=rollback)
        state = tx.init(START)
        for value, value_fn in [
            (jnp.nan, quadratic),
            (1.0, lambda p: jnp.nan),
            (jnp.inf, lambda p: jnp.inf),
        ] * 2:
            updates, state = tx.update(START, state, START, value=value, value_fn=value_fn)
            assert np.isfinite(updates["w"]).all()
        assert get_learning_rate(state) == np.float32(0.01)
        assert all(np.isfinite(leaf).all() for leaf in state.window)


def test_without_rollback_there_is_no_snapshot():
    tx = lr_tuner(optax.sgd(1.0), 0.1, explore_steps=9, recompute_every=2, rollback=False)
    state = tx.init(jnp.ones(1000))
    assert state.snapshot is None
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be a number in \(0, inf\), got 0"),
        ({"explore_steps": -1}, r"explore_steps must be an integer in \[0, .*got -1"),
        ({"recompute_every": 0}, "recompute_every must be an integer in .1, .*got 0"),
        ({"recompute_every": 2**24 + 1}, r"recompute_every must be an integer in \[1, 16777216\]"),
        ({"num_samples": 2}, "num_samples must be an integer in .3, .*got 2"),
        ({"epsilon_threshold": 0}, "epsilon_threshold must be a number in .0, inf.*got 0"),
        ({"saturation_threshold": 0.5}, "saturation_threshold must be a number in .1, inf.*got 0.5"),
        ({"method": "newton"}, "method must be one of 'fit', 'taylor', got 'newton'"),
        ({"probe_width": 1.5}, "probe_width must be a number in .0, 1.*got 1.5"),
        ({"rollback_threshold": 2}, "rollback_threshold must be a number in .0, 1.*got 2"),
        ({"min_learning_rate": -1.0}, r"min_learning_rate must be a number in \[0, inf\), got -1"),
        ({"max_learning_rate": 0.0}, r"max_learning_rate must be a number in \(0, inf\], got 0"),
        ({"min_learning_rate": 0.2}, "min_learning_rate must not exceed learning_rate, got min.*0.2"),
        ({"max_learning_rate": 0.05}, "learning_rate must not exceed max_learning_rate, got learn.*0.1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"learning_rate": 0.1, "explore_steps": 1, "recompute_every": 1}
    with pytest.raises(ValueError, match=message):
        lr_tuner(optax.sgd(1.0), **(good | arguments))


def drive(tx, values, targets, curvatures=None):
    """Rates and rollbacks at fixed parameters, for given losses and superbatches.

    A superbatch's loss has its minimum at the rate ``targets[i]`` (its maximum, if ``curvatures[i]`` is -1);
    if the target is NaN, the loss is constant.
    """

    @jax.jit
    def step(state, value, target, curvature):
        def value_fn(params):
            rate = 1 - params["w"][0] / START["w"][0]
            return jnp.where(jnp.isnan(target), 0, curvature * (rate - target) ** 2)

        return tx.update(START, state, START, value=value, value_fn=value_fn)[1]

    state, history = tx.init(START), []
    curvatures = np.ones(len(values)) if curvatures is None else curvatures
    for arguments in zip(values, targets, curvatures, strict=True):
        state = step(state, *map(np.float32, arguments))
        history.append((float(get_learning_rate(state)), int(state.num_rollbacks)))
    rates, rollbacks = zip(*history, strict=True)
    return np.array(rates), list(rollbacks)


def tuner(**settings):
    settings = {"explore_steps": 100, "recompute_every": 1, "epsilon_threshold": ENOUGH} | settings
    return lr_tuner(optax.sgd(1.0), 0.5, **settings)


NONE = float("nan")


def test_a_proposal_below_zero_is_ignored():
    exploit = tuner(explore_steps=0, saturation_threshold=1.0)
    values, targets = [8.0, 7.0, 6.9, 6.8], [NONE, NONE, -1.0, 0.25]
    rates, _ = drive(exploit, values, targets)
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.5, 0.25], rtol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "target", "expected"),
    [
        ({"max_learning_rate": 0.6}, 0.75, 0.6),
        ({"max_learning_rate": 0.8}, 0.75, 0.75),
        ({"min_learning_rate": 0.3, "explore_steps": 0}, 0.25, 0.3),
        ({"min_learning_rate": 0.2, "explore_steps": 0}, 0.25, 0.25),
    ],
)
def test_proposals_stay_within_the_bounds(bounds, target, expected):
    tx = tuner(saturation_threshold=1.0, **bounds)
    rates, _ = drive(tx, [8.0, 7.0, 6.9], [NONE, NONE, target])
    np.testing.assert_allclose(rates[-1], expected, rtol=1e-5)


def test_downhill_on_a_concave_loss_the_rate_at_most_halves():
    exploit = tuner(explore_steps=0, saturation_threshold=1.0, rollback=False)
    rates, _ = drive(exploit, [8.0, 7.0, 6.9], [NONE, NONE, 2.0], [1, 1, -1])
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.25], rtol=1e-6)
    bounded = tuner(explore_steps=0, saturation_threshold=1.0, rollback=False, epsilon_threshold=1e-6)
    rates, _ = drive(bounded, [8.0, 7.0, 6.9], [NONE, NONE, 2.0], [1, 1, -1])
    np.testing.assert_allclose(rates[-1], 0.5 - np.cbrt(6.9e-6), rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "after", "rollbacks"),
    [
        # The loss falls from 8 to 4, by half. A change then: what must the next loss be at most?
        (0.1, 3.79, 0),  # 4 * (1 - 0.1 * 0.5) = 3.8
        (0.1, 3.81, 1),
        (1.0, 1.99, 0),  # 4 * (1 - 0.5) = 2
        (1.0, 2.01, 1),
        (0.0, 3.99, 0),
        (0.0, 4.01, 1),
    ],
)
def test_a_change_is_bad_if_the_relative_drop_falls_below_its_threshold(threshold, after, rollbacks):
    rates, seen = drive(tuner(rollback_threshold=threshold), [8.0, 4.0, after], [NONE, 0.75, NONE])
    assert seen == [0, 0, rollbacks]
    np.testing.assert_allclose(rates, [0.5, 0.75, 0.5 if rollbacks else 0.75], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "rollbacks"),
    [
        ([2.0, 4.0, 7.9], 0),  # doubles before the change, and less than doubles after it
        ([2.0, 4.0, 8.1], 1),
        ([-2.0, -1.0, -0.01], 0),  # negative losses have no ratio: a rise of 1 before it, less after it
        ([-2.0, -1.0, 0.01], 1),
    ],
)
def test_a_rising_loss_may_continue_to_rise_at_the_same_speed(values, rollbacks):
    _, seen = drive(tuner(), values, [NONE, 0.75, NONE])
    assert seen[-1] == rollbacks


def test_a_change_is_decided_once():
    values, targets = [8.0, 4.0, 2.0, 50.0, np.nan, 90.0], [NONE, 0.75, NONE, NONE, NONE, NONE]
    rates, seen = drive(tuner(), values, targets)
    assert seen == [0] * 6
    np.testing.assert_allclose(rates[1:], 0.75, rtol=1e-6)


@pytest.mark.parametrize(("spread", "rollbacks"), [(0.0, 1), (2.0, 0)])
def test_a_rise_within_the_noise_of_the_losses_is_not_bad(spread, rollbacks):
    """Two windows of four losses with means 8 and 4; the third has 4.5, with and without noise before it."""
    noise = spread * np.array([1.0, -1.0, 1.0, -1.0])
    values = np.concatenate([8 + noise, 4 + noise, np.full(4, 4.5)])
    targets = [NONE] * 7 + [0.75] + [NONE] * 4
    _, seen = drive(tuner(recompute_every=4), values, targets)
    assert seen[-1] == rollbacks


def test_a_non_finite_step_is_skipped_as_a_whole():
    """Infinite gradients with finite losses, while a change of rate is pending and after it."""
    tx = tuner()
    target = {"w": 0.25 * START["w"]}  # reached at a rate of 0.75

    @jax.jit
    def step(params, state, grads, value):
        def value_fn(params):
            return jnp.sum((params["w"] - target["w"]) ** 2)

        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = step(START, tx.init(START), START, 8.0)
    np.testing.assert_allclose(get_learning_rate(state), 0.75, rtol=1e-5)
    infinite = {"w": jnp.array([jnp.inf, 1.0, jnp.nan, -jnp.inf])}
    before = params
    for skipped, value in enumerate((1.0, 0.5), start=1):
        params, state = step(params, state, infinite, value)
        np.testing.assert_array_equal(params["w"], before["w"])
        assert state.num_skipped == skipped and state.num_rollbacks == 0
