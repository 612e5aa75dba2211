"""The suite of tasks for rules without a learning rate: its halves, and each task on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.tasks import (
    SUITE_TASKS,
    TASKS,
    adapters,
    batch_norm,
    control,
    densities,
    factorisation,
    make_task,
    pinn,
    reinforcement,
    variants,
)
from experiments.tasks.suite import PAIRS, SUITE, TUNED_ON, half
from experiments.tasks.variants import Variant
from experiments.training.engine import OPTIMIZERS, Engine, Settings, batch_indices, make_specs, take

NAMES = [*SUITE_TASKS, *sorted({entry.task for entry in SUITE.values()} - SUITE_TASKS.keys())]
# They compile quickly.
QUICK = {
    "matrix-completion",
    "digits-bfloat16",
    "cancer-logistic",
}
BOUNDS = {"accuracy": (0, 1), "return": (-3, 1), "loss": (0, np.inf)}
DEVELOPMENT = [
    "pinn-poisson",
    "matrix-completion",
    "matrix-completion+adagrad",
    "outliers-gross",
    "outliers-gross+momentum",
    "swing-up-reinforce",
    "cart-pole-dqn",
    "graph-blocks",
    "flow-moons",
    "diffusion-grid",
    "diffusion-grid+adam",
    "modular-multiplication",
    "mnist1d-adapters",
    "cancer-logistic",
    "mnist1d-autoencoder",
    "mnist1d-autoencoder+lion",
    "mnist1d-convolution",
    "mnist1d-convolution+sgd",
    "digits-resnet",
    "language-lstm",
    "language-transformer",
    "mnist1d-batch-4",
    "digits-batch-1024",
    "mnist1d-batch-16",
    "digits-labels-40",
    "digits-bfloat16",
    "mnist1d-width-16",
    "mnist1d-width-256",
    "mnist1d-depth-2",
    "mnist1d-depth-3",
    "mnist1d-depth-6",
    "mnist1d-depth-6+muon",
    "mnist1d-parameters-1e-6",
    "mnist1d-loss-1e6",
]


def train(task, steps, rate, seed=0):
    """Losses of the steps with AdamW, and metric and held-out loss before and after them."""
    tx = optax.adamw(rate)

    @jax.jit
    def run(examples, test):
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        params = task.init(init_key)
        source = task.collector.init(jax.random.fold_in(batch_key, 2), params)

        def body(carry, indices):
            params, state, source = carry
            source, batch = task.collector.collect(source, params, take(examples, indices))
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, source), (loss, optax.tree.norm(grads))

        carry = (params, tx.init(params), source)
        (after, _, _), history = jax.lax.scan(body, carry, batch_indices(task, steps, batch_key))
        scores = [(task.metric(p, test), task.held_out_loss(p, test)) for p in (params, after)]
        return history, scores, after

    return run(task.train, task.test)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_five_steps_of_a_task_are_finite(name):
    task = make_task(name)
    assert task.name == name and task.metric_name and task.steps_per_epoch >= 1
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), split) for split in (task.train, task.test)
    ]
    assert shapes[0] == shapes[1]
    (losses, norms), scores, params = train(task, 5, task.learning_rates["adamw"][1])
    assert np.isfinite(losses).all() and np.isfinite(norms).all() and (np.asarray(norms) > 0).all()
    low, high = BOUNDS[task.measure]
    for metric, loss in scores:
        assert np.isfinite(metric) and low <= metric <= high and np.isfinite(loss)
    dtype = jnp.bfloat16 if "bfloat16" in name else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE_TASKS)
def test_adamw_learns_a_task(name):
    task = make_task(name)
    rate = (10 if name.endswith("completion") else 3) * task.learning_rates["adamw"][1]
    (losses, _), (before, after), _ = train(task, 400, rate)
    if task.measure == "accuracy":
        assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:3])
    elif task.measure == "loss":
        assert after[0] < 0.9 * before[0]
    else:
        assert after[0] > before[0] + 0.1


def test_the_halves_are_disjoint_and_have_one_entry_of_each_kind():
    development, held_out = half("development"), half("held-out")
    assert len(development) + len(held_out) == len(SUITE) == 2 * len({e.kind for e in SUITE.values()})
    assert sorted(e.kind for e in development) == sorted(e.kind for e in held_out)
    assert not {e.task for e in development} & {e.task for e in held_out}
    assert len({pair.kind for pair in PAIRS}) == len(PAIRS)


def test_the_halves_are_those_that_were_fixed_at_first():
    assert [entry.name for entry in half("development")] == DEVELOPMENT


def test_tasks_that_rules_were_tuned_on_are_not_held_out():
    assert not {entry.task for entry in half("held-out")} & TUNED_ON
    assert not TUNED_ON - TASKS.keys()


def test_tasks_and_optimizers_of_the_suite_exist():
    assert {entry.task for entry in SUITE.values()} <= TASKS.keys()
    assert {entry.optimizer for entry in SUITE.values()} <= OPTIMIZERS.keys()
    assert {"sgd", "momentum", "adam", "adagrad", "lion", "muon"} < {e.optimizer for e in SUITE.values()}
    assert SUITE_TASKS.keys() <= {entry.task for entry in SUITE.values()}  # none without a use


@pytest.fixture(scope="module")
def plain():
    return variants.make("plain", Variant())


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_parameters_changes_neither_loss_nor_relative_step(plain, unit):
    task = variants.make("scaled", Variant(parameter_unit=unit))
    params, scaled = plain.init(jax.random.key(0)), task.init(jax.random.key(0))
    batch = take(plain.train, np.arange(64))
    loss, grads = jax.value_and_grad(plain.loss)(params, batch)
    scaled_loss, scaled_grads = jax.value_and_grad(task.loss)(scaled, batch)
    np.testing.assert_allclose(scaled_loss, loss, rtol=1e-5)
    ratio = optax.tree.norm(scaled) / optax.tree.norm(params)
    np.testing.assert_allclose(ratio, unit, rtol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(scaled_grads) * unit, optax.tree.norm(grads), rtol=1e-3)
    # A rate scales as the step that it makes: with the parameters where the gradient's size is divided out.
    assert task.learning_rates["adamw"][1] == pytest.approx(unit * plain.learning_rates["adamw"][1])
    step = [
        t.learning_rates["sgd"][1] * optax.tree.norm(g) for t, g in ((plain, grads), (task, scaled_grads))
    ]
    np.testing.assert_allclose(step[1], unit * step[0], rtol=1e-3)


def test_the_unit_of_the_loss_scales_the_loss_only(plain):
    task = variants.make("scaled", Variant(loss_unit=1e6))
    params, batch = plain.init(jax.random.key(0)), take(plain.train, np.arange(64))
    np.testing.assert_allclose(task.loss(params, batch), 1e6 * plain.loss(params, batch), rtol=1e-6)
    np.testing.assert_allclose(task.metric(params, batch), plain.metric(params, batch))


def test_the_stated_share_of_training_labels_is_wrong(plain):
    task = variants.make("noisy", Variant(wrong_labels=0.3))
    assert np.mean(task.train["label"] != plain.train["label"]) == pytest.approx(0.3)
    np.testing.assert_array_equal(task.test["label"], plain.test["label"])
    assert set(np.unique(task.train["label"])) == set(range(10))


def test_discounted_sums_are_those_of_a_loop():
    rewards = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    expected = [sum(0.9**k * rewards[t + k] for k in range(7 - t)) for t in range(7)]
    np.testing.assert_allclose(control.discounted(jnp.asarray(rewards), 0.9), expected, rtol=1e-5)


def test_an_episode_has_no_reward_after_its_end():
    left = lambda key, observations: jnp.zeros(len(observations), jnp.int32)  # noqa: E731
    episodes = control.roll_out(control.CART_POLE, left, jax.random.split(jax.random.key(0), 4))
    lengths = np.asarray(episodes.mask.sum(axis=0))
    assert (lengths > 3).all() and (lengths < control.HORIZON).all()  # the pole falls
    np.testing.assert_array_equal(episodes.mask, np.arange(control.HORIZON)[:, None] < lengths)
    np.testing.assert_array_equal(episodes.reward, episodes.mask)


def test_a_pole_that_nobody_pushes_keeps_its_energy():
    """M v^2 / 2 + m l v w cos(angle) + 2 m l^2 w^2 / 3 + m g l cos(angle), angle 0 upright."""

    def step(state, _):
        state = control._move_cart(state, jnp.int32(1), 0.002)
        return state, state

    _, states = jax.lax.scan(step, jnp.array([0.0, 0.0, 2.0, 8.0]), length=1000)
    _, speed, angle, turning = np.asarray(states, float).T
    kinetic = 0.5 * 1.1 * speed**2 + 0.1 * 0.5 * speed * turning * np.cos(angle)
    kinetic += 0.5 * 0.1 * 0.25 * 4 / 3 * turning**2
    energy = kinetic + 0.1 * 9.8 * 0.5 * np.cos(angle)
    assert np.ptp(angle) > 6 and np.ptp(energy) < 0.02


def test_a_pendulum_that_stands_costs_nothing_and_one_that_hangs_the_most():
    up = control.PENDULUM.step(jnp.array([0.0, 0.0]), jnp.int32(1))
    np.testing.assert_allclose(up[0], 0, atol=1e-6)
    assert up[1] == 0
    down = control.PENDULUM.step(jnp.array([jnp.pi, 0.0]), jnp.int32(1))
    np.testing.assert_allclose(down[1], -(np.pi**2) / 6, rtol=1e-5)


@pytest.mark.slow
def test_dqn_learns_from_what_it_has_seen():
    task = make_task("cart-pole-dqn")
    params = task.init(jax.random.key(0))
    state = task.collector.init(jax.random.key(1), params)
    collect = jax.jit(task.collector.collect)
    for step in range(3):
        moved = jax.tree.map(lambda leaf: leaf + 1, params)
        state, batch = collect(state, moved, take(task.train, np.array([step])))
    rows = 3 * reinforcement._ENVIRONMENTS
    seen = np.asarray(state.buffer["observation"])
    assert (np.abs(seen[:rows]).sum(axis=1) > 0).all() and not seen[rows:].any()
    assert all(
        any(np.array_equal(row, known) for known in seen[:rows]) for row in np.asarray(batch["observation"])
    )
    weight = 1 - (1 - reinforcement._TARGET_RATE) ** 3
    for kept, first in zip(jax.tree.leaves(state.target), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(kept, first + weight, atol=1e-5)


@pytest.mark.slow
def test_ppo_uses_each_collection_for_its_epochs():
    task = reinforcement.make_ppo("ppo", "cart-pole")
    params = task.init(jax.random.key(0))
    state = task.collector.init(jax.random.key(1), params)
    collect = jax.jit(task.collector.collect)
    used = []
    for step in range(33):
        state, batch = collect(state, params, take(task.train, np.array([step])))
        # The policy has not changed, so the ratio is 1.
        logits = reinforcement.mlp(params["action"], batch["observation"])
        now = reinforcement._log_probability(logits, batch["action"])
        np.testing.assert_allclose(now, batch["log_probability"], atol=1e-5)
        used.append(np.asarray(batch["observation"]))
    epochs = [np.sort(np.concatenate(used[start : start + 8]).ravel()) for start in (0, 8, 16, 24)]
    for epoch in epochs[1:]:
        np.testing.assert_array_equal(epoch, epochs[0])
    assert not np.array_equal(np.sort(used[32].ravel()), np.sort(used[0].ravel()))


@pytest.mark.slow
def test_an_engine_trains_with_batches_that_depend_on_the_parameters():
    task = make_task("cart-pole-dqn")
    (result,) = Engine(task, "adamw", Settings(5)).train(make_specs(["constant"], [1e-3], [0]))
    _, got, _ = result[0]
    (losses, _), scores, _ = train(task, 5, 1e-3)
    np.testing.assert_allclose(got.loss, losses, rtol=1e-4)
    np.testing.assert_allclose((got.test_metric[0], got.test_loss[0]), scores[1], rtol=1e-4)


@pytest.mark.parametrize("viscosity", [0.05, 0.2])
def test_the_solution_of_burgers_equation_solves_it(viscosity):
    solution = pinn.burgers(viscosity).solution
    points = np.random.default_rng(0).uniform((0.1, -0.9), (0.9, 0.9), (50, 2))
    step = 1e-3
    u = lambda t, x: solution(points + np.array([t, x]) * step)  # noqa: E731
    u_t, u_x = (u(1, 0) - u(-1, 0)) / (2 * step), (u(0, 1) - u(0, -1)) / (2 * step)
    u_xx = (u(0, 1) - 2 * u(0, 0) + u(0, -1)) / step**2
    np.testing.assert_allclose(u_t + u(0, 0) * u_x - viscosity * u_xx, 0, atol=2e-3)
    start = np.stack([np.zeros(9), np.linspace(-1, 1, 9)], axis=1)
    np.testing.assert_allclose(solution(start), -np.sin(np.pi * start[:, 1]), atol=1e-6)


def test_the_residual_of_the_solution_of_poissons_equation_is_zero():
    equation = pinn.poisson(4.0)
    exact = lambda x: jnp.sin(2 * jnp.pi * x[0]) + 0.1 * jnp.sin(8 * jnp.pi * x[0])  # noqa: E731
    points = jnp.linspace(0, 1, 7)[:, None]
    np.testing.assert_allclose(jax.vmap(exact)(points), equation.solution(np.asarray(points)), atol=1e-5)
    residuals = jax.vmap(lambda point: equation.residual(exact, point))(points)
    np.testing.assert_allclose(residuals, 0, atol=1e-4)


@pytest.mark.slow
def test_the_density_of_a_flow_integrates_to_one():
    task = densities.make_flow("flow", "grid")
    params = jax.tree.map(lambda leaf: 1.2 * leaf, task.init(jax.random.key(0)))
    axis = np.linspace(-12, 12, 241, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    logs = jax.vmap(lambda point: -task.loss(params, {"input": point[None]}))(jnp.asarray(grid))
    np.testing.assert_allclose(np.exp(logs).sum() * 0.1**2, 1, atol=0.01)


@pytest.mark.slow
def test_adapters_start_at_the_network_that_they_are_added_to():
    task = adapters.make("adapters", "digits")
    first, second = (task.init(jax.random.key(seed)) for seed in (0, 1))
    batch = take(task.train, np.arange(64))
    assert task.loss(first, batch) == task.loss(second, batch)
    assert task.loss(first, batch) == adapters.make("again", "digits").loss(first, batch)
    assert not any(layer["B"].any() for layer in first) and all(layer["A"].any() for layer in first)
    assert set(np.unique(task.train["label"])) == set(range(5))


def test_factors_of_the_entries_fit_them_without_error():
    task = factorisation.make("small", (12, 10), rank=2, observed=0.5)
    assert len(task.train["label"]) == 60 and len(task.test["label"]) == 15
    seen = {tuple(row) for row in task.train["input"]}
    assert not seen & {tuple(row) for row in task.test["input"]}
    dense = np.full((12, 10), np.nan)
    rows = np.concatenate([task.train["input"], task.test["input"]])
    dense[tuple(rows.T)] = np.concatenate([task.train["label"], task.test["label"]])
    assert np.isfinite(dense).sum() == 75  # each entry once


@pytest.mark.slow
def test_a_held_out_image_is_normalised_by_training_images_alone():
    task = batch_norm.make("digits-batch-norm")
    params = task.init(jax.random.key(0))
    together = task.held_out_loss(params, take(task.test, np.arange(8)))
    alone = [task.held_out_loss(params, take(task.test, np.array([row]))) for row in range(8)]
    np.testing.assert_allclose(np.mean(alone), together, rtol=1e-4)
    training = task.loss(params, take(task.test, np.arange(8)))
    assert abs(training - together) > 1e-3
