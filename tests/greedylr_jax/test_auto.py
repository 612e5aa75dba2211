"""The rule that needs no initial rate: its ramp, the way back, and what it reaches from any rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import _search, _snapshot, _trend, auto_lr, get_learning_rate

RAMP, STEPS = 60, 300


def regression(seed=1):
    """Noisy linear regression in batches of 16: loss function, first parameters, batches."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((STEPS, 16, 5)).astype(np.float32)
    targets = inputs @ np.arange(1.0, 6.0, dtype=np.float32)
    targets += 0.5 * rng.standard_normal((STEPS, 16)).astype(np.float32)

    def loss_fn(params, batch):
        return jnp.mean((batch[0] @ params["w"] + params["b"] - batch[1]) ** 2)

    return loss_fn, {"w": jnp.full(5, 0.1), "b": jnp.zeros(())}, (inputs, targets)


def train(tx, loss_fn, params, batches):
    """Everything after each step: parameters, state and loss."""

    def body(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, loss)

    return jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), batches)[1])(params)


@pytest.mark.parametrize("inner", [optax.sgd(1.0), optax.adam(1.0)], ids=["sgd", "adam"])
def test_the_result_does_not_depend_on_the_initial_rate(inner):
    task = regression()

    def losses(rate):
        return train(auto_lr(inner, rate, total_steps=STEPS, ramp_steps=RAMP), *task)[2]

    got = np.asarray(jax.lax.map(losses, jnp.array([1e-4, 1e-2, 1.0, 1e2])))  # one compilation
    # The noise of the targets alone is 0.25; the loss starts above 50.
    assert got[:, -30:].mean(axis=1).max() < 0.32


@pytest.fixture(scope="module")
def history():
    tx = auto_lr(optax.adam(1.0), 0.01, total_steps=STEPS, ramp_steps=RAMP)
    return train(tx, *regression())


def test_the_search_always_begins_from_the_initial_parameters_and_a_fresh_optimizer(history):
    params, states, losses = history
    rates, stages = np.asarray(states.rate.learning_rate), np.asarray(states.search.stage)
    ramp = np.flatnonzero(stages == _search.RAMP)
    np.testing.assert_allclose(rates[ramp], 0.01 * 10.0 ** (-6 + 10 * ramp / (RAMP - 1)), rtol=1e-4)
    # It ends as the loss has risen above where it began.
    assert losses[ramp[-1] + 1] > losses[:10].mean()
    start = regression()[1]
    fresh = optax.adam(1.0).init(start)
    # Each return is over where a step follows whose rate differs from that before.
    steps_left, trials = np.asarray(states.restore_steps_left), np.asarray(states.search.trial)
    arrivals = [i for i in range(1, STEPS) if steps_left[i - 1] > 0 and steps_left[i] == 0]
    assert len(arrivals) == trials[-1] + 2  # after the ramp, and after each trial
    for arrival in arrivals:
        for name, value in start.items():
            np.testing.assert_array_equal(params[name][arrival - 1], value)
        kept = jax.tree.map(lambda leaf, i=arrival - 1: leaf[i], states.inner_state)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), kept, fresh)))


def pulls_before_each_step(params):
    """<g, p - p0>, with p0 rounded to 16 bits, for the regression's training through ``params``."""
    loss_fn, start, batches = regression()
    origin = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), start)
    before = jax.tree.map(lambda first, after: jnp.concatenate([first[None], after[:-1]]), start, params)

    def pull(params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return optax.tree.vdot(grads, optax.tree.sub(params, origin))

    return np.asarray(jax.vmap(pull)(before, batches))


def highest_pull(pulls):
    """Their mean and its standard error; 0 for none."""
    error = np.std(pulls, ddof=1) / len(pulls) ** 0.5 if pulls[1:] else 0.0
    return np.mean(pulls) + error if pulls else 0.0


def test_after_the_search_the_trend_rule_acts_and_the_rate_falls_to_zero_at_the_end(history):
    params, states, losses = history
    rates = np.asarray(states.rate.learning_rate)
    found, edge = float(states.search.found[-1]), float(states.search.edge[-1])
    stages, steps_left = np.asarray(states.search.stage), np.asarray(states.restore_steps_left)
    first = np.flatnonzero((stages == _search.FOUND) & (steps_left == 0))[0]
    highest = max(min(30 * found, 0.4 * edge), found) / (0.5 * found)
    pulls, seen = pulls_before_each_step(params), []
    tx, scale, scales, limited = greedylr_jax.trend_lr(max_scale=highest, drift=1.0), 1.0, [], 0
    state = tx.init(None)
    for step in range(first, STEPS):
        if step % 4 == 0:
            seen.append(pulls[step])
        pull = highest_pull(seen)
        learnt = float(states.search.first.mean[-1] - states.last.mean[step - 1])
        tx = greedylr_jax.trend_lr(
            max_scale=highest if pull < 0 else max(scale, 2.0), drift=1.4 if pull < -0.02 * learnt else 1.0
        )
        _, state = tx.update(None, state, value=losses[step])
        limited += pull >= 0 and scale < float(greedylr_jax.get_scale(state)) == 2.0
        scale = float(greedylr_jax.get_scale(state))
        scales.append(scale)
        if states.trend.decision[step] != _trend.WAIT:
            seen = []
    anneal = np.clip((STEPS - np.arange(first, STEPS)) / (0.4 * STEPS), 0, 1)
    np.testing.assert_allclose(rates[first:], 0.5 * found * np.array(scales) * anneal, rtol=1e-4)
    assert 0 < rates[-1] < 0.03 * rates[first:].max() and np.ptp(scales) > 0
    assert limited and max(scales) > 2  # both happened: the rise ended at what was found, and went on


KINDS = {
    "none": {},
    "empty": {"w": None, "b": jnp.ones((0, 3))},
    "narrow": {"w": jnp.ones(2, jnp.float16), "b": jnp.ones(2, jnp.bfloat16)},
    "integer": {"w": jnp.ones(2), "steps": jnp.ones(2, jnp.int32)},
    "complex": {"w": jnp.full(2, 1 + 2j)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pull_is_of_parameters_of_any_kind(kind):
    start = KINDS[kind]
    tx = auto_lr(optax.sgd(1.0))
    state = tx.init(start)
    state = state._replace(
        search=state.search._replace(stage=jnp.int32(_search.FOUND), found=jnp.float32(1.0))
    )
    params = jax.tree.map(lambda leaf: (leaf * 3).astype(leaf.dtype), start)
    grads = jax.tree.map(lambda leaf: -leaf, start)  # on from `start`
    _, state = tx.update(grads, state, params, value=1.0)
    expected = {"narrow": -8.0, "integer": -4.0, "complex": -20.0}.get(kind, 0.0)
    assert float(state.pulls.mean) == expected


def observe_noise(tx, level, steps, pull=0.0):
    """All states where losses are noise around ``level``, a function of the state, and pulls are ``pull``."""
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(steps).astype("f4")
    pulls = jnp.broadcast_to(jnp.float32(pull), (steps,))

    def body(state, given):
        noise, pull = given
        params = jnp.where(state.search.stage == _search.FOUND, jnp.ones(2), jnp.zeros(2))
        state = tx.update(jnp.full(2, pull / 2), state, params, value=level(state) * noise)[1]
        return state, state

    return jax.jit(lambda: jax.lax.scan(body, tx.init(jnp.zeros(2)), (noise, pulls))[1])()


# One of four is asked for.
NOISY_PULLS = np.where(np.arange(600) % 8 < 4, -1.2, 1.0)


@pytest.mark.parametrize(
    ("after", "pull", "drifts"),
    [
        (1.0, 0.0, True),
        (1.0, 1.0, True),  # nothing learnt, so that the way tells nothing
        (0.5, 0.0, False),
        (0.5, -0.02, True),
        (0.5, -0.012, True),  # a fortieth of what was learnt
        (0.5, -0.008, False),  # a sixtieth
        (0.5, NOISY_PULLS, False),
    ],
)
def test_the_rate_drifts_up_where_nothing_was_learnt_or_the_training_leads_on(after, pull, drifts):
    tx = auto_lr(optax.sgd(1.0), total_steps=1000)
    states = observe_noise(tx, lambda state: jnp.where(state.step < 310, 1.0, after), 600, pull)
    assert (states.search.stage[310:] == _search.FOUND).all()
    # The loss falls as the search ends; the first window behind that tells.
    scales = np.asarray(states.trend.scale)[350:]
    moves = scales[1:] / scales[:-1]
    moves = moves[moves != 1][:10]  # before it reaches its limit
    np.testing.assert_allclose(moves, np.full(10 if drifts else 0, 1.4), rtol=1e-5)


@pytest.mark.parametrize(
    ("result", "pull", "highest"),
    [(1.0, 1.0, "edge"), (0.5, -1.0, "below the edge"), (0.5, 1.0, "found")],
    ids=["nothing learnt", "leads on", "leads back"],
)
def test_how_far_the_rate_rises(result, pull, highest):
    tx = auto_lr(optax.sgd(1.0), ramp_steps=40, trial_steps=10)

    def level(state):
        rises = (state.search.stage == _search.RAMP) & (state.step >= 30)
        is_second_trial = (state.search.stage == _search.TRIAL) & (state.search.trial == 1)
        return jnp.where(rises, 3.0, jnp.where(is_second_trial, result, 1.0))

    states = observe_noise(tx, level, 600, pull)
    search = states.search
    assert search.stage[-1] == _search.FOUND
    expected = {"edge": search.edge, "below the edge": 0.4 * search.edge, "found": search.found}[highest]
    np.testing.assert_allclose(states.rate.learning_rate[-1], expected[-1], rtol=1e-5)


def test_the_windows_of_the_trend_rule_grow_with_the_training():
    tx = auto_lr(optax.sgd(1.0), total_steps=10_000)
    steps = np.asarray(observe_noise(tx, lambda state: 1.0, 10_000).trend.window.steps)
    assert steps[3400:3700].max() < 100 and steps[-260:].max() in range(241, 251)


def test_without_a_horizon_the_rate_does_not_fall_by_itself():
    tx = auto_lr(optax.sgd(1.0), 0.1, ramp_steps=RAMP, trial_steps=10)
    _, states, _ = train(tx, *regression())
    rates = np.asarray(states.rate.learning_rate)
    np.testing.assert_allclose(rates[-1], 0.5 * states.search.found[-1] * states.trend.scale[-1], rtol=1e-6)


def test_a_ramp_that_blows_up_leaves_nothing_that_is_not_finite():
    loss_fn = lambda params, batch: jnp.sum(jnp.exp(params["w"] ** 2)) + 0 * jnp.sum(batch)  # noqa: E731
    params = {"w": jnp.array([1.5, -1.0, 0.5])}
    tx = auto_lr(optax.sgd(1.0), 1e3, total_steps=STEPS, ramp_steps=RAMP)
    params, states, losses = train(tx, loss_fn, params, jnp.zeros(STEPS))
    assert np.max(losses) > 1e10 and states.search.stage[-1] == _search.FOUND
    assert np.isfinite(params["w"]).all() and losses[-1] < 3.01  # the minimum is 3


@pytest.fixture(scope="module")
def spoil():
    """Trains with twenty losses in the middle that are other than they should be."""
    loss_fn, params, batches = regression()
    tx = auto_lr(optax.adam(1.0), 0.01, ramp_steps=RAMP, trial_steps=10)

    def run(bad):
        def body(carry, inputs):
            params, state = carry
            batch, spoilt = inputs
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, after = tx.update(grads, state, params, value=jnp.where(spoilt, bad, loss))
            return (optax.apply_updates(params, updates), after), (params, after)

        spoilt = (np.arange(STEPS) >= 220) & (np.arange(STEPS) < 240)
        return jax.lax.scan(body, (params, tx.init(params)), (batches, spoilt))[1]

    return jax.jit(run)


@pytest.mark.parametrize("bad", [np.nan, 1e6], ids=["nan", "high"])
def test_a_training_that_is_lost_goes_back_to_its_best_parameters_and_is_slower(bad, spoil):
    seen, states = spoil(jnp.float32(bad))
    returns = np.asarray(states.num_rollbacks)
    assert returns[-1] == 1 and returns[238] == 0 and returns[239] == 1
    saved = jax.tree.map(lambda leaf: leaf[239], states.snapshot.params)
    assert (saved["w"] != regression()[1]["w"]).any()  # not the initial ones
    arrival = 240 + int(np.argmin(np.asarray(states.restore_steps_left)[240:]))
    assert arrival < 240 + _snapshot.RESTORE_STEPS
    np.testing.assert_array_equal(seen["w"][arrival], saved["w"])
    assert states.trend.scale[239] < 0.5 * states.trend.scale[219]


def test_steps_without_a_loss_are_not_counted():
    loss_fn, params, batches = regression()
    tx = auto_lr(optax.sgd(1.0), 0.1, ramp_steps=RAMP)
    state = tx.init(params)
    grads = jax.grad(loss_fn)(params, jax.tree.map(lambda rows: rows[0], batches))
    for has_value in (False, jnp.asarray(False)):
        value = {} if has_value is False else {"value": 7.0}
        flags = {"has_value": has_value} | value
        _, after = jax.jit(lambda state, flags=flags: tx.update(grads, state, params, **flags))(state)
        assert after.step == 0 and after.search.seen == 0
        assert get_learning_rate(after) == get_learning_rate(state)


def test_an_optimizer_built_with_rate_one_is_taken_as_a_direction(history):
    tx = auto_lr(optax.adam(1.0), 0.01, total_steps=STEPS, ramp_steps=RAMP)
    final = train(tx, *regression())[0]["w"][-1]
    np.testing.assert_allclose(final, history[0]["w"][-1], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"total_steps": 0}, "total_steps"),
        ({"ramp_steps": 29}, "ramp_steps"),
        ({"ramp_steps": 50.5}, "ramp_steps"),
        ({"trial_steps": 9}, "trial_steps"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        auto_lr(optax.sgd(1.0), **arguments)


def test_the_parameters_and_the_loss_are_asked_for():
    tx = auto_lr(optax.sgd(1.0))
    state = tx.init(jnp.ones(2))
    with pytest.raises(TypeError, match="requires `params`"):
        tx.update(jnp.ones(2), state, value=1.0)
    with pytest.raises(TypeError, match="value=loss"):
        tx.update(jnp.ones(2), state, jnp.ones(2))


def test_the_search_is_a_share_of_the_training():
    """A loss that never changes: the ramp goes on to its end, and so does each trial."""

    def stages(total):
        tx = auto_lr(optax.sgd(1.0), total_steps=total)

        def body(state, _):
            state = tx.update(jnp.zeros(2), state, jnp.zeros(2), value=1.0)[1]
            return state, (state.search.stage, state.search.trial)

        return jax.lax.scan(body, tx.init(jnp.zeros(2)), length=200)[1]

    totals = jnp.array([10**8, 1000, 400])
    for lengths, ramp_and_trial in zip(zip(*jax.jit(jax.vmap(stages))(totals), strict=True),
                                       ((100, 50), (60, 30), (30, 12)), strict=True):  # fmt: skip
        stage, trial = lengths
        # The loss that ends the ramp, or a trial, is that after its last step.
        assert np.sum(stage == _search.RAMP) == ramp_and_trial[0]
        assert np.sum((stage == _search.TRIAL) & (trial == 0)) == ramp_and_trial[1] + 1


def test_numbers_may_be_traced(history):
    def final(rate, total, ramp, trial):
        tx = auto_lr(optax.adam(1.0), rate, total_steps=total, ramp_steps=ramp, trial_steps=trial)
        return train(tx, *regression())[2]

    losses = jax.jit(final)(*(jnp.asarray(number) for number in (0.01, STEPS, RAMP, 10)))
    np.testing.assert_allclose(losses[-30:].mean(), history[2][-30:].mean(), rtol=0.05)
