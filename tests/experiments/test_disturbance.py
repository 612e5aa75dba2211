"""Disturbances: each changes its target and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import UsageError
from experiments.tasks import make_task
from experiments.training.disturbance import (
    KINDS,
    TARGETS,
    disturbance_inputs,
    name_of,
    parse,
    perturbation_step,
)
from experiments.training.engine import Engine, RunSpec, Settings
from experiments.training.schedules import SCHEDULES

STEPS, RATE = 200, 0.1
NOISY = [kind for kind in KINDS if kind != "none"]


@pytest.fixture(scope="module")
def results():
    """Every kind and target, with a constant rate and with a rule, in one compilation."""
    engine = Engine(make_task("quadratic-10"), "sgd", Settings(STEPS, disturbed=True))
    specs = [RunSpec("constant", RATE, 3, name_of("adversarial", 2.0, "gradient"), "constant")]
    specs += [
        RunSpec(schedule, RATE, 3, disturbance, label)
        for label, schedule in (("constant", "constant"), ("GreedyLR", "GreedyLR(patience=2)"))
        for disturbance in ("none", *(name_of(kind, 0.5, target) for kind in KINDS for target in TARGETS))
    ]
    trained = {spec: result for group in engine.train(specs) for spec, result, _ in group}
    assert engine.num_compilations == 1
    return {(spec.label, spec.disturbance): result for spec, result in trained.items()}


def test_a_run_without_noise_equals_an_undisturbed_run(results):
    plain = Engine(make_task("quadratic-10"), "sgd", Settings(STEPS))
    ((_, expected, _),) = next(plain.train([RunSpec("GreedyLR(patience=2)", RATE, 3)]))
    for target in TARGETS:
        got = results["GreedyLR", name_of("none", 0.5, target)]
        np.testing.assert_array_equal(got.rate, expected.rate)
        np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5)


@pytest.mark.parametrize("kind", NOISY)
def test_noise_of_the_observed_loss_changes_the_rule_and_not_the_training(results, kind):
    name = name_of(kind, 0.5, "observe")
    constant, clean = results["constant", name], results["constant", "none"]
    np.testing.assert_array_equal(constant.loss, clean.loss)
    np.testing.assert_array_equal(constant.rate, clean.rate)
    assert (results["GreedyLR", name].rate != results["GreedyLR", "none"].rate).any()


@pytest.mark.parametrize("kind", NOISY)
def test_noise_of_the_gradients_changes_the_parameters_at_its_first_step(results, kind):
    name = name_of(kind, 0.5, "gradient")
    noise = disturbance_inputs(name, STEPS, 3)
    assert not noise.observe.any() and not noise.parameters.any()
    disturbed, clean = results["constant", name], results["constant", "none"]
    np.testing.assert_array_equal(disturbed.rate, clean.rate)
    first = int(np.flatnonzero(noise.gradient)[0])
    np.testing.assert_array_equal(disturbed.loss[: first + 1], clean.loss[: first + 1])
    assert disturbed.loss[first + 1] != clean.loss[first + 1]


@pytest.mark.parametrize("kind", [kind for kind in NOISY if "spike" not in kind and kind != "burst"])
def test_noise_of_the_gradients_does_not_vanish_at_the_minimum(results, kind):
    """A constant rate ends higher: the noise has the norm of the first gradient to the end."""
    disturbed, clean = results["constant", name_of(kind, 0.5, "gradient")], results["constant", "none"]
    assert disturbed.loss[-20:].mean() > 2 * clean.loss[-20:].mean()


def test_reduce_on_plateau_stops_at_its_floor():
    """A loss that never improves reduces the rate twice, to a hundredth."""
    rule = SCHEDULES["plateau"].transform(2, {})
    state = rule.init(jnp.ones(()))

    def step(state, _):
        scale, state = rule.update(jnp.ones(()), state, value=jnp.asarray(1.0))
        return state, scale

    scales = jax.lax.scan(step, state, length=200)[1]
    np.testing.assert_allclose(np.unique(np.round(scales, 5)), [0.01, 0.1, 1.0])
    assert np.argmax(scales < 1) == 2 * 11 - 1  # the first evaluation is the best; ten more do not improve


@pytest.mark.parametrize("kind", NOISY)
def test_a_parameter_perturbation_changes_the_parameters_once(results, kind):
    name = name_of(kind, 0.5, "parameters")
    noise = disturbance_inputs(name, STEPS, 3)
    (at,) = np.flatnonzero(noise.parameters)
    assert STEPS // 4 <= at < STEPS - STEPS // 4
    assert not noise.observe.any() and not noise.gradient.any()
    disturbed, clean = results["constant", name], results["constant", "none"]
    np.testing.assert_array_equal(disturbed.loss[: at + 1], clean.loss[: at + 1])
    # Near the minimum the loss increases in every direction.
    assert disturbed.loss[at + 1] > 1.5 * clean.loss[at + 1]
    # Without another perturbation the loss decreases from there on.
    assert (np.diff(disturbed.loss[at + 1 :]) < 0).all()


@pytest.mark.parametrize("kind", NOISY)
def test_the_target_all_combines_the_other_targets(results, kind):
    parts = [disturbance_inputs(name_of(kind, 0.5, target), STEPS, 3) for target in TARGETS[:3]]
    together = disturbance_inputs(name_of(kind, 0.5, "all"), STEPS, 3)
    for index in range(3):
        np.testing.assert_array_equal(together[index], parts[index][index])
    everything = results["GreedyLR", name_of(kind, 0.5, "all")]
    for target in TARGETS[:3]:
        assert (everything.loss != results["GreedyLR", name_of(kind, 0.5, target)].loss).any()


def test_adversarial_noise_opposes_descent(results):
    """With adversarial noise of twice the gradient the first step increases the loss."""
    clean, ascending = results["constant", "none"], results["constant", "adversarial, 2, gradient"]
    # The gradient g becomes g - 2 g: to first order the loss increases by what it decreased.
    assert clean.loss[1] < clean.loss[0] == ascending.loss[0] < ascending.loss[1]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_noise_are_as_named(kind):
    noise = KINDS[kind](np.random.default_rng(0), 1000)
    assert noise.shape == (1000,) and np.isfinite(noise).all()
    is_as_named = {
        "none": not noise.any(),
        "gaussian": abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1,
        "periodic spike": set(np.diff(np.flatnonzero(noise))) == {50} and noise.max() == 1,
        "random spike": np.count_nonzero(noise) == 20 and len(set(np.diff(np.flatnonzero(noise)))) > 5,
        "plateau": len(np.unique(noise)) == 20 and (np.diff(noise) != 0).sum() == 19,
        "oscillatory": np.allclose(noise[:970], noise[30:]) and np.isclose(noise.max(), 1, atol=0.01),
        "drift": (np.diff(noise) > 0).all() and noise[-1] == 1,
        "burst": 0 < np.count_nonzero(noise) <= 100,
        "adversarial": set(noise) == {1.0, -1.0} and (noise[:11] == 1).all() and (noise[11:22] == -1).all(),
    }
    assert is_as_named[kind]


def test_noise_depends_on_the_seed_only():
    one, again, other = (disturbance_inputs("gaussian, 1, all", 50, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.observe, again.observe)
    assert (one.observe != other.observe).any()


def test_strength_scales_the_noise():
    weak, strong = (disturbance_inputs(f"burst, {strength}, all", 400, 0) for strength in (0.1, 1.0))
    for low, high in zip(weak[:3], strong[:3], strict=True):
        np.testing.assert_allclose(10 * low, high, rtol=1e-5)
    assert perturbation_step(weak.gradient) == perturbation_step(strong.gradient)


@pytest.mark.parametrize("name", ["loud, 1, all", "gaussian, 1, loss", "gaussian, x, all", "gaussian"])
def test_an_unknown_disturbance_is_refused(name):
    with pytest.raises(UsageError, match="unknown disturbance"):
        parse(name)
