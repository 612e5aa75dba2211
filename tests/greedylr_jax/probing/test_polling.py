"""Factor polling against Algorithm 1 in plain Python, and with candidates that diverge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import factor_polling, get_scale

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
UPDATES = {"w": jnp.array([-0.5, 0.25]), "b": jnp.array([0.125])}
FACTORS = (4.0, 2.0, 1.0, 0.5, 0.25)


def distance(params):
    """Distance of the parameters along the updates, of which the tests define the loss as a function."""
    return (1.0 - params["w"][0]) / 0.5


def expected_factor(losses, sharpness, normalize, score="exponential", factors=FACTORS):
    """Algorithm 1, lines 7 to 11."""
    losses, factors = np.asarray(losses, float), np.asarray(factors)
    valid = np.isfinite(losses)
    if not valid.any():
        return factors.min()
    losses, factors = losses[valid], factors[valid]
    if normalize == "minmax" and np.ptp(losses) > 0:
        losses = (losses - losses.min()) / np.ptp(losses)
    if normalize == "standard" and losses.std() > 0:
        losses = (losses - losses.mean()) / losses.std()
    above = sharpness * (losses - losses.min())
    scores = {"exponential": np.exp(-above), "inverse": 1 / (1 + above), "linear": (1 - above).clip(0)}[score]
    return np.exp(np.sum(scores * np.log(factors)) / np.sum(scores))


def poll(losses, *, factors=FACTORS, **settings):
    """One update whose candidates have the given losses."""
    tx = factor_polling(factors, **settings)
    order = np.argsort(factors)
    edges = jnp.asarray(np.sqrt(np.sort(factors)[1:] * np.sort(factors)[:-1]), jnp.float32)
    table = jnp.asarray(losses, jnp.float32)[order]
    return tx.update(
        UPDATES,
        tx.init(PARAMS),
        PARAMS,
        value_fn=lambda params: table[jnp.searchsorted(edges, distance(params))],
    )


LOSSES = [
    [3.0, 2.0, 1.0, 2.0, 3.0],
    [0.1, 0.2, 0.3, 0.4, 0.5],
    [1.0, 1.0, 1.0, 1.0, 1.0],
    [-5.0, -4.0, -2.0, -1.0, -0.5],
    [np.nan, 9.0, 3.0, 1.0, 2.0],
    [np.inf, np.inf, -np.inf, 1.0, 2.0],
    [np.inf, np.nan, np.inf, np.inf, 2.5],
]


@pytest.mark.parametrize(
    ("normalize", "score"),
    [
        ("minmax", "exponential"),
        ("standard", "exponential"),
        ("none", "exponential"),
        ("minmax", "inverse"),
        ("standard", "linear"),
    ],
)
def test_the_scale_is_multiplied_by_the_weighted_mean_of_the_factors(normalize, score):
    settings = {"normalize": normalize, "score": score, "decline": False}
    poll_many = jax.jit(jax.vmap(lambda losses, sharpness: poll(losses, sharpness=sharpness, **settings)))
    for sharpness in (0.0, 1.0, 7.5):
        updates, states = poll_many(jnp.array(LOSSES), jnp.full(len(LOSSES), sharpness))
        expected = [expected_factor(losses, sharpness, normalize, score) for losses in LOSSES]
        np.testing.assert_allclose(states.rule.scale, expected, rtol=1e-5)
        for name, update in UPDATES.items():
            np.testing.assert_allclose(updates[name], np.outer(expected, update), rtol=1e-5)


def test_if_all_candidates_diverge_the_minimum_factor_is_used_and_the_update_is_zero():
    updates, state = poll([np.nan] * 5)
    assert get_scale(state) == 0.25
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    updates, state = poll([np.inf] * 5, decline=False)
    assert get_scale(state) == 0.25
    np.testing.assert_array_equal(updates["w"], 0.25 * UPDATES["w"])


NAN = np.nan


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("losses", "declines", "repeats"),
    [
        ([1.0] * 5, False, False),
        ([NAN] * 5, True, True),
        ([NAN, NAN, NAN, 1.0, 1.0], True, True),  # the current rate diverges
        ([NAN, NAN, 1.0, 1.0, 1.0], False, True),  # only higher rates diverge
        ([NAN, 1.0, 1.0, 1.0, 1.0], False, True),
        ([1.0, 1.0, 1.0, 1.0, NAN], False, True),
    ],
)
def test_a_period_starts_with_a_poll_in_which_no_candidate_has_diverged(losses, declines, repeats, every):
    updates, state = poll(losses, every=every)
    assert all((leaf == 0).all() == declines for leaf in jax.tree.leaves(updates))
    scale = get_scale(state)
    tx = factor_polling(FACTORS, every=every)
    _, after = tx.update(UPDATES, state, PARAMS, value_fn=lambda p: jnp.nan)
    polled = float(get_scale(after)) != float(scale)  # the minimum factor, if it polls
    assert polled == (repeats or every == 1)
    _, never = poll(losses, every=every, decline=False)
    assert get_scale(never) == scale


@pytest.mark.parametrize(
    ("value", "polls"), [(2.0, False), (2.15, False), (2.25, True), (np.nan, True), (np.inf, True)]
)
def test_a_period_ends_early_if_the_loss_has_diverged(value, polls):
    """The threshold is 10% above the first loss, 2."""
    tx = factor_polling((2.0, 1.0), every=100)
    _, state = tx.update(UPDATES, tx.init(PARAMS), PARAMS, value=2.0, value_fn=lambda p: 1.0)
    _, after = tx.update(UPDATES, state, PARAMS, value=value, value_fn=lambda p: 1.0)
    assert (get_scale(after) != get_scale(state)) == polls
    _, without = tx.update(UPDATES, state, PARAMS, value_fn=lambda p: 1.0)
    assert get_scale(without) == get_scale(state)


def test_without_declining_a_diverged_step_uses_the_mean_of_the_others():
    losses = [NAN, NAN, NAN, 1.0, 1.0]
    updates, state = poll(losses, decline=False)
    np.testing.assert_allclose(updates["w"], get_scale(state) * UPDATES["w"], rtol=1e-6)


def test_rounding_of_the_loss_is_no_divergence():
    """A step of zero, as at the start of a warm-up, may give a loss that differs in its last digits."""
    tx = factor_polling(FACTORS, every=2)
    zero = jax.tree.map(jnp.zeros_like, UPDATES)
    _, state = tx.update(zero, tx.init(PARAMS), PARAMS, value=2.0, value_fn=lambda p: 2.0001)
    assert get_scale(state) == 1.0


def test_a_candidate_far_above_the_first_loss_is_ignored():
    tx = factor_polling((2.0, 1.0, 0.5), sharpness=0.0, divergence=1.5)

    def scale_after(value, losses, state):
        _, state = tx.update(
            UPDATES,
            state,
            PARAMS,
            value=value,
            value_fn=lambda p: jnp.interp(distance(p) / get_scale(state), jnp.array([0.5, 1, 2]), losses),
        )
        return state

    state = scale_after(2.0, jnp.array([1.0, 2.9, 3.1]), tx.init(PARAMS))
    np.testing.assert_allclose(get_scale(state), np.sqrt(0.5), rtol=1e-6)  # 3.1 > 1.5 * 2.0
    # The reference is the first loss, not a lower one after it.
    again = scale_after(0.1, jnp.array([1.0, 2.9, 2.9]), state)
    np.testing.assert_allclose(get_scale(again), np.sqrt(0.5), rtol=1e-6)
    # If the current loss is higher, it is the reference.
    higher = scale_after(100.0, jnp.array([90.0, 120.0, 151.0]), state)
    np.testing.assert_allclose(get_scale(higher), np.sqrt(0.5) * np.sqrt(0.5), rtol=1e-6)


@pytest.mark.parametrize(("losses", "bound"), [([9.0, 1.0], 1.5), ([1.0, 9.0], 0.75)])
def test_the_scale_stays_within_its_bounds(losses, bound):
    settings = dict(factors=(0.1, 10.0), min_scale=0.75, max_scale=1.5, sharpness=20.0)
    updates, state = poll(losses, **settings)
    assert get_scale(state) == np.float32(bound)
    np.testing.assert_allclose(updates["w"], bound * UPDATES["w"], rtol=1e-6)


def test_it_polls_every_few_steps_and_only_with_an_observation():
    calls = []

    def value_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(params["w"] ** 2)

    tx = factor_polling((2.0, 1.0, 0.5), every=4)
    step = jax.jit(
        lambda state, has: tx.update(UPDATES, state, PARAMS, value=5.0, value_fn=value_fn, has_value=has)[1]
    )
    state = tx.init(PARAMS)
    for index in range(10):
        state = step(state, index != 0)
    jax.effects_barrier()
    assert len(calls) == 3 * 3  # at steps 1, 5 and 9
    unchanged = tx.update(UPDATES, state, PARAMS, has_value=False)[1]
    assert unchanged is state


def test_factors_may_be_traced():
    def scale(factors, sharpness):
        tx = factor_polling(factors, sharpness=sharpness)
        _, state = tx.update(UPDATES, tx.init(PARAMS), PARAMS, value_fn=lambda p: jnp.sum(p["w"] ** 2))
        return get_scale(state)

    many = jnp.array([[2.0, 1.0, 0.5], [8.0, 1.0, 0.125]])
    got = jax.jit(jax.vmap(scale))(many, jnp.array([1.0, 30.0]))
    assert got[0] != got[1]
    np.testing.assert_allclose(got, [scale(many[0], 1.0), scale(list(many[1]), 30.0)], rtol=1e-6)


def test_in_any_position_of_a_chain_it_scales_the_step():
    def loss_fn(params):
        return jnp.sum((params["w"] - 3.0) ** 2) + jnp.sum(params["b"] ** 2)

    def train(tx):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            value, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn)
            params = optax.apply_updates(params, updates)
        return params, get_scale(state)

    right = train(optax.chain(optax.adam(0.1), factor_polling()))
    either = train(greedylr_jax.chain(factor_polling(), optax.adam(0.1)))
    assert right[1] == either[1] != 1
    np.testing.assert_array_equal(right[0]["w"], either[0]["w"])
    greedylr_jax.assert_controls_learning_rate(optax.chain(optax.adam(0.1), factor_polling()), PARAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": ()}, r"factors must be one or more numbers in \(0, inf\), got \(\)"),
        ({"factors": (1.0, 0.0)}, "factors must be a number in .0, inf.*got 0"),
        ({"factors": 2.0}, "factors must be one or more numbers"),
        ({"factors": [1.0, "a"]}, "factors must be a number in .0, inf.*got 'a'"),
        ({"every": 0}, "every must be an integer in .1, .*got 0"),
        ({"sharpness": -1.0}, "sharpness must be a number in .0, inf.*got -1"),
        ({"normalize": "max"}, "normalize must be one of 'minmax', 'standard', 'none', got 'max'"),
        ({"score": "best"}, "score must be one of 'exponential', 'inverse', 'linear', got 'best'"),
        ({"min_scale": 0.0}, "min_scale must be a number in .0, inf.*got 0"),
        ({"min_scale": 2.0, "max_scale": 1.0}, "min_scale must not exceed max_scale"),
        ({"divergence": 0.5}, "divergence must be a number in .1, inf.*got 0.5"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        factor_polling(**arguments)
