"""The parts of the laboratory, one by one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from sklearn.datasets import load_digits

import greedylr_jax
from experiments.data.digits import Digits
from experiments.data.loading import load_split
from experiments.errors import UsageError
from experiments.reporting import summary
from experiments.tasks import make_task
from experiments.tasks.convolution import matmul_convolution
from experiments.training.engine import Engine, RunSpec, Settings, batch_indices
from experiments.training.schedules import ADAPTIVE, GREEDY_DEFAULTS, PASSIVE, parse, schedule_inputs, switch
from experiments.training.store import RunStore, write_atomically


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_digits_are_those_of_scikit_learn(data_dir):
    splits = {name: load_split(Digits, name, data_dir) for name in ("train", "test")}
    images = np.concatenate([split["image"] for split in splits.values()])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    original = load_digits()
    assert sorted(map(bytes, images)) == sorted(map(bytes, original.images.astype(np.uint8)))
    counts = np.bincount(splits["test"]["label"])
    assert len(counts) == 10 and counts.min() >= 34  # a stratified fifth


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 1)])
def test_matmul_convolution_is_a_convolution(strides, kernel):
    images = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    weights = jax.random.normal(jax.random.key(1), (*kernel, 3, 4))
    expected = jax.lax.conv_general_dilated(
        images, weights, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(matmul_convolution(images, weights, strides), expected, atol=1e-5)


def linear_task(data_dir):
    """Logistic regression on the digits: compiles much faster than the networks."""

    def logits(params, batch):
        return batch["input"].reshape(-1, 64) @ params

    def loss(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["label"])
        return jnp.mean(losses)

    def accuracy(params, batch):
        return jnp.mean(jnp.argmax(logits(params, batch), axis=-1) == batch["label"])

    def init(key):
        return jax.random.normal(key, (64, 10)) / 8

    return make_task("digits", data_dir)._replace(init=init, loss=loss, metric=accuracy)


def test_a_run_of_the_engine_is_plain_training(data_dir):
    """One compiled run of many must equal the same run written out with Optax."""
    task = linear_task(data_dir)
    steps, rate, seed = 60, 0.2, 3
    tuned = "GreedyLR(factor=0.5, patience=2)"
    specs = [RunSpec(schedule, rate, seed) for schedule in (*PASSIVE, *ADAPTIVE, tuned)]
    engine = Engine(task, "sgd", Settings(steps, evaluations=3))
    got = {spec.schedule: result for group in engine.train(specs) for spec, result, _ in group}
    assert engine.num_compilations == 1

    transformations = {
        "GreedyLR": optax.chain(optax.sgd(rate), greedylr_jax.greedy_lr()),
        tuned: optax.chain(optax.sgd(rate), greedylr_jax.greedy_lr(0.5, 2)),
        "plateau": optax.chain(optax.sgd(rate), ADAPTIVE["plateau"](task.steps_per_epoch, GREEDY_DEFAULTS)),
    }
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    batches = batch_indices(task, steps, batch_key)
    for name, transformation in transformations.items():
        tx = optax.with_extra_args_support(transformation)

        def body(carry, indices, tx=tx):
            params, state = carry
            batch = jax.tree.map(lambda examples: jnp.asarray(examples)[indices], task.train)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        params = task.init(init_key)
        (params, _), loss = jax.jit(
            lambda params, state, body=body: jax.lax.scan(body, (params, state), batches)
        )(params, tx.init(params))
        np.testing.assert_allclose(got[name].loss, loss, rtol=1e-4, err_msg=name)
        assert got[name].test_metric.shape == got[name].test_loss.shape == (3,)
        np.testing.assert_allclose(got[name].test_metric[-1], task.metric(params, task.test), atol=0.003)
        np.testing.assert_allclose(got[name].test_loss[-1], task.loss(params, task.test), rtol=1e-3)
        assert got[name].test_loss[0] > got[name].test_loss[-1]
    assert len({got[name].loss[-1] for name in transformations}) == 3


def test_batches_are_permutations_of_whole_epochs(data_dir):
    task = make_task("digits", data_dir)
    batches = np.asarray(batch_indices(task, 3 * task.steps_per_epoch, jax.random.key(0)))
    for epoch in batches.reshape(3, -1):
        assert len(np.unique(epoch)) == len(epoch)
    assert not (batches[0] == batches[task.steps_per_epoch]).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_applies_one_and_keeps_the_others(index):
    tx = switch(jnp.int32(index), [optax.scale(2.0), optax.trace(0.5), optax.trace(0.9)])
    state = tx.init(jnp.ones(2))
    updates, after = tx.update(jnp.ones(2), state)
    np.testing.assert_array_equal(updates, [2.0, 2.0] if index == 0 else [1.0, 1.0])
    changed = [not np.array_equal(a.trace, b.trace) for a, b in zip(state[1:], after[1:], strict=True)]
    assert changed == [index == 1, index == 2]


def test_an_adaptive_schedule_starts_from_a_constant_rate():
    inputs = schedule_inputs("GreedyLR", 0.3, 10)
    np.testing.assert_array_equal(inputs.rates, np.full(10, np.float32(0.3)))
    assert inputs.adaptive != schedule_inputs("plateau", 0.3, 10).adaptive != 0
    assert schedule_inputs("cosine", 0.3, 10).adaptive == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sawtooth", "unknown schedule 'sawtooth'; there are: constant"),
        ("cosine(factor=0.5)", r"unknown settings \['factor'\]; there are: none"),
        ("ARC(weights='nowhere')", "nowhere"),
        ("GreedyLR(speed=2)", r"unknown settings \['speed'\]; there are: factor, patience"),
        ("GreedyLR(factor=)", "cannot read the settings"),
        ("GreedyLR(factor=2.0)", "factor must be"),
        ("GreedyLR(patience=-1)", "patience must be"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(name, message):
    with pytest.raises((UsageError, ValueError), match=message):
        parse(name)


def test_an_engine_needs_evaluations_that_divide_the_steps(data_dir):
    with pytest.raises(ValueError, match="steps must be a multiple of evaluations, got 10 and 3"):
        Engine(linear_task(data_dir), "sgd", Settings(10, evaluations=3))


def fake_runs():
    """Two seeds of two schedules, ten steps: GreedyLR at 1, constant at 2 and diverging in seed 1."""
    rows = []
    for schedule, seed, level in [
        ("GreedyLR", 0, 1.0),
        ("GreedyLR", 1, 1.05),
        ("constant", 0, 2.0),
        ("constant", 1, math.nan),
    ]:
        rows.append(
            dict(
                task="digits", optimizer="sgd", schedule=schedule, learning_rate=0.1, seed=seed, steps=10,
                test_loss=level, test_metric=0.5, loss=[level] * 10, rate=[0.1] * 10,
            )
        )  # fmt: skip
    return pl.DataFrame(rows)


def test_a_diverged_run_counts_as_infinite():
    table = summary.summarize(fake_runs())
    ours, theirs = table.filter(schedule="GreedyLR"), table.filter(schedule="constant")
    assert ours["loss_100"][0] == pytest.approx(1.025)
    assert theirs["loss_100"][0] == math.inf
    assert theirs.select("at_10", "at_50", "at_100").row(0) == ("beats",) * 3
    assert math.isnan(theirs["difference_low"][0])
    assert ours["at_100"][0] is None


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "runs.parquet"
    target.write_text("before")
    with pytest.raises(UsageError, match="No space left on device"):
        write_atomically(target, fail)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_fresh_drops_an_unfinished_comparison(tmp_path):
    store = RunStore(tmp_path, {"steps": 1})
    store.append([{"seed": 0}])
    assert len(RunStore(tmp_path, {"steps": 1}).rows()) == 1
    with pytest.raises(UsageError, match="other settings"):
        RunStore(tmp_path, {"steps": 2})
    assert RunStore(tmp_path, {"steps": 2}, fresh=True).rows() is None
