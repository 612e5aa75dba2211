"""Losses and derivatives along a direction, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedylr_jax import superbatch_loss
from greedylr_jax.probing import _probe

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
DIRECTION = {"w": jnp.array([0.5, 1.0]), "b": jnp.array(-1.0)}


def cubic(params):
    return jnp.sum(params["w"] ** 3) + params["b"] ** 2


def along(t):
    """The same function of the distance t, multiplied out by hand."""
    return (1 + 0.5 * t) ** 3 + (-2 + t) ** 3 + (0.5 - t) ** 2


def test_losses_along_are_those_of_the_moved_parameters():
    distances = jnp.array([-1.0, 0.0, 0.25, 3.0])
    got = jax.jit(lambda: _probe.losses_along(cubic, PARAMS, DIRECTION, distances))()
    np.testing.assert_allclose(got, along(np.asarray(distances)), rtol=1e-6)


@pytest.mark.parametrize("t", [-0.75, 0.0, 2.0])
def test_taylor_coefficients_are_the_derivatives(t):
    got = jax.jit(lambda: _probe.taylor_along(cubic, PARAMS, DIRECTION, jnp.float32(t)))()
    slope = 1.5 * (1 + 0.5 * t) ** 2 + 3 * (-2 + t) ** 2 - 2 * (0.5 - t)
    half_curvature = 0.75 * (1 + 0.5 * t) + 3 * (-2 + t) + 1
    np.testing.assert_allclose(got, [along(t), slope, half_curvature], rtol=1e-5)


@pytest.mark.parametrize("num_samples", [3, 4, 5, 9])
def test_a_parabola_is_fitted_exactly_and_other_losses_by_least_squares(num_samples):
    t = np.linspace(-0.3, 0.3, num_samples)
    exact = _probe.fit_parabola(jnp.asarray(7 + 2 * t + 5 * t**2, jnp.float32), jnp.float32(0.3))
    np.testing.assert_allclose(exact, [7, 2, 5], rtol=2e-5)
    losses = np.sin(9 * t)
    fitted = _probe.fit_parabola(jnp.asarray(losses, jnp.float32), jnp.float32(0.3))
    np.testing.assert_allclose(fitted, np.polynomial.polynomial.polyfit(t, losses, 2), rtol=1e-4, atol=1e-5)


def test_a_superbatch_is_the_mean_of_its_batches():
    batches = {"x": jnp.arange(24.0).reshape(4, 3, 2), "y": jnp.ones((4, 3))}

    def loss_fn(params, batch):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    expected = np.mean([loss_fn(PARAMS, {"x": batches["x"][i], "y": batches["y"][i]}) for i in range(4)])
    np.testing.assert_allclose(superbatch_loss(loss_fn, batches)(PARAMS), expected, rtol=1e-6)


def test_a_superbatch_needs_the_memory_of_one_batch():
    def loss_fn(weights, x):
        return jnp.mean(jnp.tanh(x @ weights) ** 2)

    def temporary_bytes(count):
        batches = jnp.ones((count, 256, 64))
        compiled = jax.jit(lambda w, x: superbatch_loss(loss_fn, x)(w)).lower(jnp.ones((64, 512)), batches)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) < 1.1 * temporary_bytes(2)


@pytest.mark.parametrize(
    "batches", [{}, {"x": jnp.ones((3, 2)), "y": jnp.ones(4)}, jnp.float32(1), jnp.ones((0, 2))]
)
def test_a_superbatch_without_batches_or_with_unequal_axes_raises(batches):
    with pytest.raises(ValueError, match="batches must hold arrays with one leading axis"):
        superbatch_loss(lambda params, batch: 0.0, batches)
