"""Smoothness estimates against known Hessians, and the convergence bound against gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedylr_jax import get_scale, greedy_lr
from greedylr_jax.theory import convergence_bound, estimate_smoothness, local_smoothness, optimal_factor


def quadratic(eigenvalues, seed=0):
    """x -> x^T A x / 2 with these eigenvalues in a random basis."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((len(eigenvalues), len(eigenvalues))))
    matrix = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T, jnp.float32)
    return lambda x: 0.5 * x @ matrix @ x


@pytest.mark.parametrize(
    "eigenvalues", [[1.0, 2.0, 30.0], [0.0, 0.0, 5.0], [-7.0, 1.0, 3.0], [0.0, 0.0, 0.0]]
)
def test_smoothness_is_the_largest_absolute_eigenvalue(eigenvalues):
    estimate = jax.jit(lambda x: estimate_smoothness(quadratic(eigenvalues), x))(jnp.ones(len(eigenvalues)))
    np.testing.assert_allclose(estimate, np.abs(eigenvalues).max(), rtol=1e-3)


def test_smoothness_of_a_network_matches_its_full_hessian():
    x = jax.random.normal(jax.random.key(0), (32, 4))

    def loss_fn(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(x.sum(axis=1))) ** 2)

    keys = jax.random.split(jax.random.key(1))
    params = {"hidden": jax.random.normal(keys[0], (4, 5)), "out": jax.random.normal(keys[1], (5,))}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda vector: loss_fn(unravel(vector))))(flat)
    expected = np.abs(np.linalg.eigvalsh(hessian)).max()
    got = jax.jit(lambda p: estimate_smoothness(loss_fn, p, num_iterations=500, tolerance=1e-6))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert jax.jit(lambda p: estimate_smoothness(loss_fn, p, num_iterations=1))(params) < 0.9 * expected


def run_local_smoothness(gradients, params, decay=0.5):
    tx = local_smoothness(decay)
    state = tx.init(params[0])
    states = []
    for gradient, here in zip(gradients, params, strict=True):
        updates, state = jax.jit(tx.update)(gradient, state, here)
        np.testing.assert_array_equal(updates, gradient)
        states.append(state)
    return states


def test_local_smoothness_is_the_quotient_of_differences_and_its_running_mean():
    params = [jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0]), jnp.array([3.0, 4.0]), jnp.array([3.0, 5.0])]
    gradients = [jnp.array([0.0, 0.0]), jnp.array([0.0, 10.0]), jnp.array([9.0, 9.0]), jnp.array([9.0, 15.0])]
    states = run_local_smoothness(gradients, params)
    assert np.isnan(states[0].latest) and states[0].count == 0
    assert (states[1].latest, states[1].mean) == (2.0, 2.0)
    assert states[2][:4] == states[1][:4]  # no step, no estimate
    assert (states[3].latest, states[3].mean, states[3].maximum) == (6.0, 4.0, 6.0)


def test_local_smoothness_ignores_gradients_that_are_not_finite():
    params = [jnp.float32(step) for step in range(5)]
    gradients = [jnp.float32(value) for value in (0.0, 2.0, np.nan, 4.0, 7.0)]
    states = run_local_smoothness(gradients, params)
    assert [int(state.count) for state in states] == [0, 1, 1, 1, 2]
    assert states[-1].latest == 3.0


def test_local_smoothness_of_a_quadratic_is_at_most_the_true_one():
    loss_fn = quadratic([1.0, 4.0, 10.0])
    tx = optax.chain(local_smoothness(), optax.sgd(0.18))
    params, state = jnp.array([1.0, -1.0, 2.0]), tx.init(jnp.ones(3))
    for _ in range(50):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert 9.5 < state[0].maximum < 10.01


def test_the_optimal_factor_and_its_domain():
    assert optimal_factor(2.0) == 0.5
    np.testing.assert_allclose(jax.vmap(optimal_factor)(jnp.array([4.0, 100.0])), [0.75, 0.99])
    for smoothness in (1.0, 0.5, -3.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"smoothness must be a number in \(1, inf\)"):
            optimal_factor(smoothness)


def descend(eigenvalues, start, rates):
    """Gradient descent in float64 on a diagonal quadratic: loss after each step."""
    x, losses = np.array(start, np.float64), []
    for rate in rates:
        x = x - rate * eigenvalues * x
        losses.append(0.5 * np.sum(eigenvalues * x**2))
    return np.array(losses)


@settings(max_examples=200, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=5),
    start=st.lists(st.floats(-5.0, 5.0), min_size=5, max_size=5),
    fractions=st.lists(st.floats(1e-3, 1.999), min_size=1, max_size=30),
    use_strong=st.booleans(),
)
def test_the_bound_holds_on_random_quadratics_with_any_rates(eigenvalues, start, fractions, use_strong):
    eigenvalues, start = np.array(eigenvalues), np.array(start[: len(eigenvalues)])
    rates = np.array(fractions) / eigenvalues.max()
    bound = convergence_bound(
        rates,
        smoothness=eigenvalues.max(),
        initial_distance=np.linalg.norm(start),
        strong_convexity=eigenvalues.min() if use_strong else 0.0,
    )
    # A learning rate of 1/L reaches the optimum in one step up to rounding, which is coarse for subnormals.
    rounding = eigenvalues.max() * np.sum((1e-14 * start) ** 2) + np.finfo(np.float64).tiny
    assert (descend(eigenvalues, start, rates) <= bound * (1 + 1e-9) + rounding).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), patience=st.integers(0, 5))
def test_the_bound_holds_for_greedy_lr_and_its_minimum_rate_gives_one_in_advance(seed, patience):
    generator = np.random.default_rng(seed)
    eigenvalues = generator.uniform(0.01, 5.0, 6)
    start, rate = generator.standard_normal(6), 0.3 / eigenvalues.max()
    curvature = jnp.asarray(eigenvalues, jnp.float32)
    tx = optax.chain(optax.sgd(rate), greedy_lr(0.8, patience, min_scale=0.5, max_scale=3.0, window=None))

    def body(carry, _):
        x, state = carry
        value = 0.5 * jnp.sum(curvature * x**2)
        updates, state = tx.update(curvature * x, state, x, value=value)
        return (optax.apply_updates(x, updates), state), state[1].rule.scale

    first = jnp.asarray(start, jnp.float32)
    _, scales = jax.jit(lambda: jax.lax.scan(body, (first, tx.init(first)), length=60))()
    known = {"smoothness": eigenvalues.max(), "initial_distance": np.linalg.norm(start)}
    rates = rate * np.asarray(scales, float)
    bound = convergence_bound(rates, **known)
    assert (descend(eigenvalues, start, rates) <= bound).all()
    assert (bound <= convergence_bound(np.full(60, rate / 2), **known)).all()
    assert rates.max() > rates.min()


def test_the_bound_is_tight_within_a_factor_on_a_flat_function():
    """Learning rates far below 1/L on a quadratic of low curvature, where the loss decreases slowly."""
    steps = 50
    rates = np.full(steps, 1.0)
    curvature = 1 / (2 * steps)
    loss = descend(np.array([curvature]), [1.0], rates)[-1]
    bound = convergence_bound(rates, smoothness=1.0, initial_distance=1.0)[-1]
    assert bound / 8 < loss < bound


@pytest.mark.parametrize("rates", [[0.0], [1.0], [np.nan], [-0.1, 0.1], 0.5])
def test_learning_rates_out_of_range_raise(rates):
    with pytest.raises(ValueError, match=r"learning_rates must be .* in \(0, 1\)"):
        convergence_bound(rates, smoothness=2.0, initial_distance=1.0)


def test_the_unit_of_the_loss_changes_no_decision_so_no_factor_of_the_smoothness_alone_can_be_optimal():
    @jax.jit
    def scales(unit):
        tx = optax.chain(optax.scale(-0.02 / unit), greedy_lr(0.5, 1, threshold_mode="rel", window=None))

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: unit * jnp.sum(jnp.array([0.1, 2.0]) * p**2))(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), get_scale(state)

        params = jnp.array([1.0, -3.0])
        return jax.lax.scan(step, (params, tx.init(params)), None, length=25)[1]

    expected = scales(1.0)
    for unit in (0.25, 64.0):  # powers of two, so that nothing is rounded
        np.testing.assert_array_equal(scales(unit), expected)
    assert len(set(expected.tolist())) > 3
