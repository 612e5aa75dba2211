"""The parts of the experiments: data, schedules, the engine, summaries and the store."""

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
from experiments.reporting.palette import Look
from experiments.studies import (
    compare,
    finetune,
    greedylr,
    leaderboard,
    lrtuner,
    polling,
    rate_sensitivity,
    robustness,
)
from experiments.studies.base import sources
from experiments.tasks import make_task
from experiments.tasks.base import TextScore
from experiments.tasks.convolution import matmul_convolution
from experiments.training.engine import Engine, RunSpec, Settings
from experiments.training.loop import batch_indices, train
from experiments.training.schedules import (
    SCHEDULES,
    AdaptiveScale,
    PassiveSchedule,
    parse,
    schedule_inputs,
    switch,
)
from experiments.training.store import RunStore, write_atomically


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_digits_equal_those_of_scikit_learn(data_dir):
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
    """Logistic regression on digits, which compiles much faster than the networks."""

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


def kinds(kind):
    return [name for name, entry in SCHEDULES.items() if isinstance(entry, kind)]


@pytest.mark.slow
def test_a_run_of_the_engine_equals_plain_training(data_dir, monkeypatch):
    """Every run of a compiled program equals the same run written in plain Optax.

    The schedule that is added to the registry needs no other edit.
    """
    halves = PassiveSchedule(
        name="halves",
        source="this test",
        look=Look("#123456"),
        fractions=lambda steps: lambda step: jnp.where(step < steps // 2, 1.0, 0.5),
    )
    monkeypatch.setitem(SCHEDULES, "halves", halves)
    task = linear_task(data_dir)
    steps, rate, seed = 60, 0.2, 3
    tuned = "GreedyLR(factor=0.5, patience=2)"
    names = (*kinds(PassiveSchedule), *kinds(AdaptiveScale), tuned)
    engine = Engine(task, "sgd", Settings(steps, evaluations=3))
    specs = [RunSpec(schedule, rate, seed) for schedule in names]
    got = {spec.schedule: result for group in engine.train(specs) for spec, result, _ in group}
    assert engine.num_compilations == 1
    np.testing.assert_array_equal(got["halves"].rate, np.float32([rate] * 30 + [rate / 2] * 30))

    plateau = SCHEDULES["plateau"].transform(1, {})  # 60 steps: every step is an evaluation
    transformations = {
        "GreedyLR": optax.chain(optax.sgd(rate), greedylr_jax.greedy_lr()),
        tuned: optax.chain(optax.sgd(rate), greedylr_jax.greedy_lr(0.5, 2)),
        "plateau": optax.chain(optax.sgd(rate), plateau),
        "halves": optax.sgd(lambda step: rate * halves.fractions(steps)(step)),
    }
    for name, tx in transformations.items():
        params, loss, _ = jax.jit(lambda tx=tx: train(task, tx, steps, seed))()
        np.testing.assert_allclose(got[name].loss, loss, rtol=1e-4, err_msg=name)
        assert got[name].test_metric.shape == got[name].test_loss.shape == (3,)
        np.testing.assert_allclose(got[name].test_metric[-1], task.metric(params, task.test), atol=0.003)
        np.testing.assert_allclose(got[name].test_loss[-1], task.loss(params, task.test), rtol=1e-3)
        assert got[name].test_loss[0] > got[name].test_loss[-1]
    assert len({got[name].loss[-1] for name in transformations}) == 4


@pytest.mark.slow
def test_predictions_are_those_of_the_final_parameters(data_dir):
    def predict(params, batch):
        return jnp.argmax(batch["input"].reshape(-1, 64) @ params, axis=-1)

    task = linear_task(data_dir)
    labels = np.asarray(task.test["label"])
    score = TextScore("accuracy", predict, lambda rows: 100 * float(np.mean(rows == labels)))
    engine = Engine(task._replace(text=score), "sgd", Settings(10, text=True))
    (((_, result, _),),) = engine.train([RunSpec("constant", 0.5, 0)])
    assert result.predictions.shape == labels.shape
    assert score.score(result.predictions) == pytest.approx(100 * result.test_metric[-1], abs=1e-3)
    assert len(np.unique(result.predictions)) > 1


def test_every_schedule_has_a_look_and_a_label_of_its_own():
    looks, labels = ([getattr(entry, name) for entry in SCHEDULES.values()] for name in ("look", "label"))
    assert len(set(looks)) == len(looks) and len(set(labels)) == len(labels)
    assert all(name == entry.name and entry.source for name, entry in SCHEDULES.items())


def fractions(name, steps=980):
    return schedule_inputs(name, 1.0, steps).rates


def test_passive_schedules_are_those_of_their_sources():
    np.testing.assert_allclose(fractions("polynomial"), fractions("linear"), atol=1e-6)  # power 1
    warm = fractions("warmup")
    assert warm[0] == 0 and warm[49] == pytest.approx(0.5) and set(warm[98:]) == {1.0}
    for name, epochs, factor in (("exponential", 30, 0.9), ("exponential-text", 98, 0.96)):
        rates = fractions(name)
        np.testing.assert_allclose(np.unique(rates)[::-1], factor ** np.arange(epochs), rtol=1e-5)
        assert np.ptp(np.diff(np.flatnonzero(np.diff(rates)))) <= 1  # equal epochs
    starts = np.flatnonzero(np.diff(fractions("cyclic-cosine-text")) > 0) + 1
    np.testing.assert_array_equal(starts, [140, 420])  # 14 and 14 + 28 of 98 epochs


def test_the_patience_of_pytorch_is_one_epoch_longer_than_that_of_keras_and_optax():
    tx, patience = SCHEDULES["plateau-torch"].transform(1, {}), 10  # PyTorch's default
    state = tx.init(jnp.ones(()))
    scales = []
    for _ in range(2 * patience):  # the first loss is the best; Optax would lower the rate at number 10
        scale, state = tx.update(jnp.ones(()), state, value=1.0)
        scales.append(float(scale))
    assert np.flatnonzero(np.diff(scales)).tolist() == [patience]
    assert scales[-1] == pytest.approx(0.1)


def test_reports_list_the_source_of_each_schedule():
    section = sources(("cosine", "warmup", "GreedyLR(patience=5)", "cosine"))
    assert [row[0] for row in section.parts[0].rows] == [
        "cosine",
        "warmup (constant with warm-up)",
        "GreedyLR(patience=5)",
    ]
    assert "SGDR" in section.parts[0].rows[0][1] and "second GreedyLR paper" in section.parts[0].rows[2][1]


@pytest.mark.parametrize(
    "study", [compare, finetune, greedylr, leaderboard, lrtuner, polling, rate_sensitivity, robustness]
)
def test_studies_choose_schedules_from_the_registry(study):
    names = {*getattr(study, "SCHEDULES", ())}
    names |= {each.schedule for each in getattr(study, "SUBMISSIONS", getattr(study, "CASES", ()))}
    names |= {*getattr(study, "PAIRS", {}).values()}
    assert names and {name.partition("(")[0] for name in names} <= set(SCHEDULES)
    for name in names:
        parse(name)  # raises an error if the schedule has no such setting


def test_settings_of_a_schedule_are_those_that_it_accepts():
    assert set(SCHEDULES["GreedyLR"].settings) == {
        "factor", "patience", "threshold", "cooldown", "warmup", "min_scale", "max_scale",
    }  # fmt: skip
    assert SCHEDULES["ARC"].settings == {"weights": None, "decisions": 10, "validation": True}
    settings = {name: SCHEDULES[name].settings for name in kinds(PassiveSchedule)}
    assert {name: each for name, each in settings.items() if each} == {
        "always-raise": {"decisions": 10},
        "random-action": {"decisions": 10, "draw": 0},
    }
    entry, settings = parse("ARC(decisions=4)")
    assert entry is SCHEDULES["ARC"] and settings == {"decisions": 4}


@pytest.mark.slow
def test_the_controls_of_arc_change_the_rate_in_the_steps_of_its_decisions():
    raised = schedule_inputs("always-raise(decisions=3)", 0.5, 12).rates
    np.testing.assert_allclose(raised, 0.5 * 1.618 ** np.array([0, 0, 0, *[1] * 4, *[2] * 4, 3]), rtol=1e-6)
    # As ARC does, which multiplies the update of the step that completes a cycle.
    tx = greedylr_jax.arc.arc(steps_per_cycle=4)
    state, scales = tx.init(jnp.ones(1)), []
    for _ in range(12):
        _, state = tx.update(jnp.ones(1), state, value=1.0)
        scales.append(float(greedylr_jax.get_scale(state)))
    changed = np.flatnonzero(np.diff(raised)) + 1
    assert len(np.flatnonzero(np.diff(scales))) > 0
    assert set(np.flatnonzero(np.diff(scales)) + 1) <= set(changed) == {3, 7, 11}

    draws = [schedule_inputs(f"random-action(draw={draw})", 1.0, 100).rates for draw in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    ratios = np.concatenate([each[1:] / each[:-1] for each in draws])
    np.testing.assert_allclose(np.unique(ratios.round(3)), [0.618, 1.0, 1.618])


def test_batches_are_permutations_of_whole_epochs(data_dir):
    task = make_task("digits", data_dir)
    batches = np.asarray(batch_indices(task, 3 * task.steps_per_epoch, jax.random.key(0)))
    for epoch in batches.reshape(3, -1):
        assert len(np.unique(epoch)) == len(epoch)
    assert not (batches[0] == batches[task.steps_per_epoch]).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_applies_one_transformation_and_does_not_change_the_states_of_the_others(index):
    tx = switch(jnp.int32(index), [optax.scale(2.0), optax.trace(0.5), optax.trace(0.9)])
    state = tx.init(jnp.ones(2))
    updates, after = tx.update(jnp.ones(2), state)
    np.testing.assert_array_equal(updates, [2.0, 2.0] if index == 0 else [1.0, 1.0])
    changed = [not np.array_equal(a.trace, b.trace) for a, b in zip(state[1:], after[1:], strict=True)]
    assert changed == [index == 1, index == 2]


def test_an_adaptive_schedule_starts_from_a_constant_rate():
    inputs = schedule_inputs("GreedyLR", 0.3, 10)
    np.testing.assert_array_equal(inputs.rates, np.full(10, np.float32(0.3)))
    assert inputs.scale_index != schedule_inputs("plateau", 0.3, 10).scale_index != 0
    assert schedule_inputs("cosine", 0.3, 10).scale_index == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sawtooth", "unknown schedule 'sawtooth'; the schedules are constant"),
        ("cosine(factor=0.5)", r"unknown settings \['factor'\]; the settings are none"),
        ("ARC(weights='nowhere')", "nowhere"),
        ("GreedyLR(speed=2)", r"unknown settings \['speed'\]; the settings are factor, patience"),
        ("GreedyLR(factor=)", "cannot read the settings"),
        ("GreedyLR(factor=2.0)", "factor must be"),
        ("GreedyLR(patience=-1)", "patience must be"),
        ("always-raise(decisions=0)", "decisions must be an integer >= 1, got 0"),
    ],
)
def test_an_invalid_schedule_is_refused_by_name(name, message):
    with pytest.raises((UsageError, ValueError), match=message):
        parse(name)


def test_evaluations_must_divide_the_steps(data_dir):
    with pytest.raises(ValueError, match="multiple of evaluations, got steps=10 and evaluations=3"):
        Engine(linear_task(data_dir), "sgd", Settings(10, evaluations=3))


def fake_runs():
    """Two seeds of two schedules, ten steps: the loss of GreedyLR is 1, that of constant 2 or diverges."""
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
    greedy, constant = table.filter(schedule="GreedyLR"), table.filter(schedule="constant")
    assert greedy["loss_100"][0] == pytest.approx(1.025)
    assert constant["loss_100"][0] == math.inf
    assert constant.select("at_10", "at_50", "at_100").row(0) == ("beats",) * 3
    assert math.isnan(constant["difference_low"][0])
    assert greedy["at_100"][0] is None


def test_a_failed_write_changes_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "runs.parquet"
    target.write_text("before")
    with pytest.raises(UsageError, match="No space left on device"):
        write_atomically(target, fail)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_fresh_discards_an_unfinished_study(tmp_path):
    store = RunStore(tmp_path, {"steps": 1})
    store.append([{"seed": 0}])
    assert len(RunStore(tmp_path, {"steps": 1}).rows()) == 1
    with pytest.raises(UsageError, match="other settings"):
        RunStore(tmp_path, {"steps": 2})
    assert RunStore(tmp_path, {"steps": 2}, fresh=True).rows() is None
