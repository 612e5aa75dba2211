"""Samples for ARC: rounds and branches step by step, labels, the plan, and resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from rich.console import Console

from experiments.arc import generate as module
from experiments.arc.configurations import CONFIGURATIONS, OPTIMIZERS, RATES, Configuration
from experiments.arc.generate import ROUNDS, Rounds, Training, correct_label, plan, samples_of, train_rounds
from experiments.tasks.base import Task

MULTIPLIERS = (1.618, 1.0, 0.618)


def linear_task():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 3)).astype(np.float32)
    targets = inputs @ np.array([1.0, -2.0, 0.5], np.float32) + 0.3 * rng.standard_normal(40).astype("f4")
    examples = {"input": inputs, "target": targets}

    def loss(params, batch):
        return jnp.mean((batch["input"] @ params - batch["target"]) ** 2)

    train, test = (
        jax.tree.map(lambda rows, part=part: rows[part], examples) for part in (slice(30), slice(30, 40))
    )
    return Task("linear", lambda key: jax.random.normal(key, (3,)), loss, loss, "loss", train, test, 4)


def step_by_step(task, make_optimizer, training):
    """Section 3.2 as a Python loop over training steps, with the random numbers of the compiled program."""
    init_key, run_key = jax.random.split(jax.random.key(training.seed))
    keys = iter(jax.random.split(run_key, 4 * ROUNDS + 1))
    train, test = (jax.tree.map(jnp.asarray, examples) for examples in (task.train, task.test))

    @jax.jit
    def step(params, state, rate, drawn):
        batch = jax.tree.map(lambda rows: rows[drawn], train)
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, state = make_optimizer(rate).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, loss, task.loss(params, test)

    def train_epochs(params, state, rate, key):
        losses, validation = [], []
        for index in range(training.epochs * module.EPOCH_STEPS):
            drawn = jax.random.randint(jax.random.fold_in(key, index), (4,), 0, 30)
            params, state, loss, held_out = step(params, state, rate, drawn)
            losses.append(float(loss))
            if (index + 1) % module.EPOCH_STEPS == 0:
                validation.append(float(held_out))
        return params, state, losses, validation

    params, rate = task.init(init_key), np.float32(training.learning_rate)
    state = make_optimizer(rate).init(params)
    rounds = []
    for _ in range(ROUNDS):
        params, state, losses, validation = train_epochs(params, state, rate, next(keys))
        branch_keys = [next(keys) for _ in range(3)]
        ends = [
            train_epochs(params, state, np.float32(rate * multiplier), key)[3][-1]
            for multiplier, key in zip(np.float32(MULTIPLIERS), branch_keys, strict=True)
        ]
        others = [(int(np.argmax(ends)) + 1) % 3, (int(np.argmax(ends)) + 2) % 3]
        drawn = others[int(jax.random.randint(branch_keys[-1], (), 0, 2))]
        rounds.append((losses, validation, rate, ends, drawn))
        rate = np.float32(rate * np.float32(MULTIPLIERS[drawn]))
    return rounds, train_epochs(params, state, rate, next(keys))[3]


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_rounds_and_branches_equal_a_step_by_step_implementation(optimizer, monkeypatch):
    monkeypatch.setattr(module, "EPOCH_STEPS", 3)
    task, training = linear_task(), Training(seed=4, learning_rate=0.05, epochs=2)
    program = jax.jit(functools.partial(train_rounds, task, OPTIMIZERS[optimizer]))
    got = program((task.train, task.test), training)
    expected, last = step_by_step(task, OPTIMIZERS[optimizer], training)
    for index, (losses, validation, rate, ends, drawn) in enumerate(expected):
        np.testing.assert_allclose(got.train_loss[index, :6], losses, rtol=1e-4)
        assert np.isnan(got.train_loss[index, 6:]).all()
        np.testing.assert_allclose(got.validation_loss[index, :2], validation, rtol=1e-4)
        np.testing.assert_allclose(got.rate[index], rate, rtol=1e-6)
        np.testing.assert_allclose(got.branch_loss[index], ends, rtol=1e-4)
        assert got.drawn[index] == drawn
    np.testing.assert_allclose(got.validation_loss[ROUNDS, :2], last, rtol=1e-4)
    assert len(set(np.asarray(got.drawn).tolist())) > 1


@pytest.mark.parametrize(
    ("branches", "drawn", "repeated", "label"),
    [
        ((0.1, 0.2, 0.3), 0, 0.15, 0),  # the same order
        ((0.1, 0.2, 0.3), 0, 0.25, 1),  # another branch has the lowest loss
        ((0.1, 0.2, 0.3), 1, 0.05, 1),
        ((0.1, 0.2, 0.3), 1, 0.35, 1),  # the lowest is the same, but the order differs
        ((0.3, 0.2, 0.1), 2, 0.19, 2),
        ((np.inf, 0.2, 0.1), 2, 0.15, 2),  # a diverged branch is the worst
        ((np.inf, 0.2, 0.1), 2, np.inf, 1),
    ],
)
def test_labels_are_corrected_if_the_repeated_loss_changes_the_order(branches, drawn, repeated, label):
    assert correct_label(np.array(branches), drawn, repeated) == label


def make_rounds(**changes):
    steps = module.MAX_EPOCHS * module.EPOCH_STEPS
    rounds = Rounds(
        np.arange(11 * steps, dtype=np.float32).reshape(11, steps),
        np.arange(110, dtype=np.float32).reshape(11, 10),
        np.arange(1, 12, dtype=np.float32),
        np.tile(np.array([3.0, 2.0, 1.0], np.float32), (10, 1)),
        np.full(10, 2),
    )
    return rounds._replace(**changes)


def test_a_sample_has_up_to_three_rounds_without_padding():
    rounds, training = make_rounds(), Training(0, 0.1, 4)
    samples = list(samples_of(training, rounds))
    assert [len(sample["rates"]) for sample in samples] == [1, 2] + 8 * [3]
    fifth = samples[4]
    assert fifth["rates"] == [3.0, 4.0, 5.0]
    np.testing.assert_array_equal(fifth["train_loss"], rounds.train_loss[2:5, : 4 * module.EPOCH_STEPS])
    np.testing.assert_array_equal(fifth["validation_loss"], rounds.validation_loss[2:5, :4])
    # The next round ends at 53, above the others, which changes the order.
    assert fifth["repeated"] == 53 and (fifth["uncorrected"], fifth["label"]) == (2, 1)


def test_samples_end_at_the_round_that_diverged():
    losses = make_rounds().train_loss.copy()
    losses[6, 3] = np.nan
    assert len(list(samples_of(Training(0, 0.1, 4), make_rounds(train_loss=losses)))) == 6


def test_the_plan_has_every_configuration_and_optimizer_with_rates_in_their_ranges():
    planned = list(plan(640))
    assert len(CONFIGURATIONS) >= 12 and len(planned) == len(CONFIGURATIONS) * len(OPTIMIZERS)
    trainings = [training for _, _, each in planned for training in each]
    assert 600 <= len(trainings) <= 680
    assert {training.epochs for training in trainings} == set(range(1, 11))
    for _, optimizer, each in planned:
        low, high = RATES[optimizer]
        assert each and all(low <= training.learning_rate <= high for training in each)
    assert list(plan(640)) == planned
    assert all(len(each) == 1 for _, _, each in plan(1))


@pytest.mark.slow
def test_a_resumed_generation_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    configurations = tuple(Configuration(f"linear {i}", linear_task) for i in range(2))
    monkeypatch.setattr(module, "CONFIGURATIONS", configurations)
    monkeypatch.setattr(module, "OPTIMIZERS", {"sgd": OPTIMIZERS["sgd"]})
    monkeypatch.setattr(module, "EPOCH_STEPS", 2)
    console = Console(quiet=True)
    whole = module.generate(tmp_path / "whole", 10, console)
    train = module._train

    def interrupted(*arguments):
        for count, group in enumerate(train(*arguments)):
            if arguments[0] is configurations[1] and count == 1:
                raise KeyboardInterrupt
            yield group

    monkeypatch.setattr(module, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.generate(tmp_path / "broken", 10, console)
    monkeypatch.setattr(module, "_train", train)
    again = module.generate(tmp_path / "broken", 10, console)
    keys = ["configuration", "seed", "round"]
    assert again.sort(keys).equals(whole.sort(keys)) and len(whole) > 50
    assert pl.read_parquet(tmp_path / "broken/runs.parquet").equals(again)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_a_configuration_learns(configuration):
    task = configuration.make()
    tx = OPTIMIZERS["adam"](5e-3)

    @jax.jit
    def train(params):
        def step(index, carry):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(0), index)
            drawn = jax.random.randint(key, (task.batch_size,), 0, task.num_examples)
            batch = jax.tree.map(lambda rows: jnp.asarray(rows)[drawn], task.train)
            updates, state = tx.update(jax.grad(task.loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 300, step, (params, tx.init(params)))[0]

    params = task.init(jax.random.key(0))
    before, after = (float(jax.jit(task.loss)(each, task.test)) for each in (params, train(params)))
    assert after < 0.95 * before
