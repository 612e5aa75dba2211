"""Tasks: every task can be learned, and losses and metrics are correct."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from flax import nnx

from experiments.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from experiments.errors import UsageError
from experiments.tasks import (
    FINE_TUNING_TASKS,
    PRETRAINING_TASKS,
    SUITE_TASKS,
    TASKS,
    detection,
    functions,
    make_task,
    question_answering,
    resnet18,
    seq2seq,
    text_scores,
)
from experiments.tasks.base import CLASSIFICATION
from experiments.tasks.segmentation import _mean_iou
from experiments.tasks.transformer import Transformer, causal_mask, padding_mask

PUBLIC = [name for name in TASKS if "public set" in TASKS[name].summary]
assert len(PUBLIC) >= 4
FUNCTIONS = list(functions.FUNCTIONS)
# Tasks whose data are prepared in a second, and that compile quickly.
QUICK = {"digits-mlp", *FUNCTIONS}


def train(task, steps):
    """Losses and gradient norms of a few steps with AdamW, and the final metric."""
    tx = optax.adamw(task.learning_rates["adamw"][2])

    @jax.jit
    def run(train, test):
        def body(carry, step):
            params, state = carry
            batch = jax.tree.map(
                lambda leaf: jnp.roll(leaf, -step * task.batch_size, axis=0)[: task.batch_size], train
            )
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (loss, optax.tree.norm(grads))

        params = task.init(jax.random.key(0))
        (params, _), history = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))
        return *history, task.metric(params, test)

    limited = [jax.tree.map(lambda leaf: jnp.asarray(leaf[:500]), split) for split in (task.train, task.test)]
    return run(*limited)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in TASKS
        if name not in (*PUBLIC, *SUITE_TASKS, *PRETRAINING_TASKS, *FINE_TUNING_TASKS)
    ],
)
def test_a_task_can_be_learned(name):
    task = make_task(name)
    assert task.name == name and task.steps_per_epoch >= 1
    losses, norms, metric = train(task, 60)
    assert np.isfinite(losses).all() and (np.asarray(norms) > 0).all()
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert 0 <= metric <= 1
    shapes = [jax.tree.map(lambda leaf: leaf.shape[1:], split) for split in (task.train, task.test)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_task_is_built_from_mock_data(name, tmp_path):
    with tfds.testing.mock_data(num_examples=40):
        task = make_task(name, tmp_path)
    params = task.init(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:4]), task.train)
    assert np.isfinite(task.loss(params, batch)) and 0 <= task.metric(params, batch) <= 1


def test_resnet_18_is_that_of_the_papers():
    shapes = jax.eval_shape(lambda key: resnet18.init(key, 10), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 11_173_962  # pytorch-cifar's
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    logits, statistics = jax.eval_shape(resnet18.apply, shapes, images)
    assert logits.shape == (8, 10) and len(statistics) == 1 + 8 * 2 + 3


def test_images_are_shifted_and_mirrored():
    image = jnp.arange(1.0, 32 * 32 + 1).reshape(1, 32, 32, 1)
    images = jnp.repeat(image, 64, axis=0)
    augmented = np.asarray(resnet18.augment(jax.random.key(0), images))
    padded = np.pad(np.asarray(image[0]), ((4, 4), (4, 4), (0, 0)))
    crops = [padded[row : row + 32, column : column + 32] for row in range(9) for column in range(9)]
    possible = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
    assert {row.tobytes() for row in augmented} <= possible
    assert len({row.tobytes() for row in augmented}) > 32


def test_greedy_decoding_stops_at_the_end():
    def module(source, target):
        """The next word is the previous one plus 1, the first is the source's, and 7 is the last."""
        following = jnp.where(target == START, source, jnp.where(target == 7, END, target + 1))
        return jax.nn.one_hot(following, 20)

    decoded = text_scores.decode_greedily(module, jnp.array([[5], [9]]), 5)
    np.testing.assert_array_equal(decoded, [[5, 6, 7, END, PAD], [9, 10, 11, 12, 13]])


def test_bleu_is_that_of_the_words_up_to_the_end():
    pytest.importorskip("sacrebleu")
    vocabulary = Vocabulary([["open", "the", "new", "file", "now"]], 20)
    reference = ["open", "the", "new", "file", "now"]
    row = vocabulary.encode([*reference, "x"], 7)
    row[5:] = [END, row[0]]  # what follows the end does not count
    score = text_scores.bleu_score(vocabulary, [reference], 7)
    assert score.score(row[None]) == pytest.approx(100.0)
    # One unknown word of five: precisions 4/5, 2/4, 1/3 and 1/4 of 2 (smoothed).
    row[2] = UNKNOWN
    expected = 100 * (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
    assert score.score(row[None]) == pytest.approx(expected)


def test_f1_counts_the_words_that_answers_share():
    tokens = np.array([[9, 5, 6, 6, 7], [9, 5, 6, 6, 7]])
    score = text_scores.answer_score(tokens, np.array([[1, 2], [3, 4]]), None).score
    assert score(np.array([[1, 3], [4, 3]])) == pytest.approx(100 * (2 * 2 / 5 + 0) / 2)


def test_an_unknown_task_lists_the_available_ones():
    with pytest.raises(UsageError, match=r"unknown task 'imagenet'; there are: digits, .*ackley"):
        make_task("imagenet")


@pytest.mark.slow
def test_the_minimum_of_each_function_is_zero():
    at = {"rosenbrock": 1.0}
    for name, function in functions.FUNCTIONS.items():
        point = jnp.full(function.dimensions, at.get(name, 0.0))
        assert abs(function.value(point)) < 1e-5, name
        assert np.isfinite(jax.grad(function.value)(point)).all()
        for seed in range(5):
            assert function.value(point + 0.3 * jax.random.normal(jax.random.key(seed), point.shape)) > 0
    np.testing.assert_allclose(functions.FUNCTIONS["rosenbrock"].value(jnp.array([0.0, 0, 0, 0])), 3.0)
    np.testing.assert_allclose(functions.FUNCTIONS["rastrigin"].value(jnp.full(4, 0.5)), 81.0, rtol=1e-6)
    np.testing.assert_allclose(functions.FUNCTIONS["ackley"].value(jnp.ones(4)), 3.6253849, rtol=1e-5)


@pytest.mark.parametrize(("name", "condition"), [("quadratic-10", 10), ("quadratic-1000", 1000)])
def test_a_quadratic_has_the_condition_number_of_its_name(name, condition):
    function = functions.FUNCTIONS[name]
    curvatures = np.linalg.eigvalsh(jax.hessian(function.value)(jnp.zeros(function.dimensions)))
    np.testing.assert_allclose(curvatures[-1] / curvatures[0], condition, rtol=1e-3)


class Constant:
    """A model with constant outputs."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, *inputs):
        return self.outputs


def test_mean_iou_is_over_the_classes_that_occur():
    label = jnp.array([[0, 0, 1, 2]])
    logits = jax.nn.one_hot(jnp.array([[0, 1, 1, 1]]), 11)
    # 1/2 for the background, 1/3 for class 1, 0/1 for class 2.
    got = _mean_iou(Constant(logits), {"input": label, "label": label})
    np.testing.assert_allclose(got, (1 / 2 + 1 / 3 + 0) / 3, rtol=1e-6)
    assert CLASSIFICATION.metric(Constant(logits), {"input": label, "label": label}) == 0.5


def test_padding_is_excluded_from_loss_and_accuracy():
    target = jnp.array([[1, 5, 2, 0, 0]])
    logits = 10.0 * jax.nn.one_hot(jnp.array([[5, 3, 7, 7]]), 8)
    batch = {"source": target, "target": target}
    assert seq2seq.OBJECTIVE.metric(Constant(logits), batch) == 0.5
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[:, :2], target[:, 1:3]).mean()
    np.testing.assert_allclose(seq2seq.OBJECTIVE.loss(Constant(logits), batch), expected, rtol=1e-6)


@pytest.mark.parametrize("bias", [0.0, 1e13])
def test_uniform_span_scores_give_the_log_of_the_number_of_words(bias):
    """For any common bias, including that of a diverged network."""
    words = jnp.arange(48) < jnp.array([10, 20])[:, None, None]
    scores = jnp.broadcast_to(jnp.where(words, bias, -1e9), (2, 2, 48))  # both ends of two answers
    loss = question_answering._loss(Constant(scores), {"input": None, "span": jnp.full((2, 2), 4)})
    np.testing.assert_allclose(loss, (np.log(10) + np.log(20)) / 2, rtol=1e-5)


@pytest.mark.slow
def test_a_decoder_ignores_future_tokens_and_padding():
    model = Transformer(11, 6, 8, 1, cross=True, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    encoded = jax.random.normal(jax.random.key(0), (1, 6, 8))
    mask = padding_mask(jnp.array([[1, 1, 1, 0, 0, 0]]))
    run = lambda tokens, encoded: model(tokens, causal_mask(tokens), encoded, mask)  # noqa: E731
    before = run(tokens, encoded)
    changed = run(tokens.at[0, 4].set(9), encoded)
    np.testing.assert_allclose(changed[:, :4], before[:, :4], atol=1e-6)
    assert not np.allclose(changed[:, 4:], before[:, 4:], atol=1e-3)
    np.testing.assert_allclose(run(tokens, encoded.at[0, 3:].add(1)), before, atol=1e-6)  # padding
    assert not np.allclose(run(tokens, encoded.at[0, 2].add(1)), before, atol=1e-3)


BOXES = jnp.array([[0.0, 0, 8, 8], [10, 12, 26, 28], [-1, -1, -1, -1]])
LABELS = jnp.array([3, 7, -1])


def perfect_outputs():
    """Logits and offsets that detect each object at its best anchor, and nothing elsewhere."""
    overlaps = detection.overlap(detection.ANCHORS, BOXES[:2])
    best = overlaps.argmax(axis=0)
    logits = jnp.full((len(detection.ANCHORS), detection.CLASSES), -20.0)
    logits = logits.at[best, LABELS[:2]].set(jnp.array([4.0, 5.0]))
    targets = jnp.zeros_like(detection.ANCHORS).at[best].set(BOXES[:2])
    offsets = detection._encode(jnp.where(targets.any(axis=1, keepdims=True), targets, detection.ANCHORS))
    return logits, offsets, best


def test_decoding_inverts_encoding():
    boxes = detection.ANCHORS + jnp.array([1.0, -2.0, 3.0, 1.0])
    np.testing.assert_allclose(detection._decode(detection._encode(boxes)), boxes, atol=1e-4)


def test_every_object_overlaps_an_anchor():
    for size in (8, 16):
        for top in range(0, detection.CANVAS - size + 1):
            for left in range(0, detection.CANVAS - size + 1, 3):
                box = jnp.array([[top, left, top + size, left + size]], jnp.float32)
                assert detection.overlap(detection.ANCHORS, box).max() > 0.39


@jax.jit
def precision_and_loss(logits, offsets):
    module = Constant((logits[None], offsets[None]))
    batch = {"input": None, "boxes": BOXES[None], "labels": LABELS[None]}
    return detection._ap50(module, batch), detection._loss(module, batch)


def detect(logits, offsets):
    precision, loss = precision_and_loss(logits, offsets)
    return float(precision), float(loss)


def test_average_precision_is_one_for_perfect_detections_and_lower_with_each_mistake():
    logits, offsets, best = perfect_outputs()
    precision, loss = detect(logits, offsets)
    assert precision == 1.0
    wrong_class = logits.at[best[0], 3].set(-20.0).at[best[0], 4].set(4.0)
    assert detect(wrong_class, offsets)[0] == pytest.approx(0.5)
    assert detect(wrong_class, offsets)[1] > loss + 1
    moved = offsets.at[best[0], 0].add(1.0)
    assert detect(logits, moved)[0] == pytest.approx(0.5)
    # A second detection of the same object with nearly the same box is suppressed, without a penalty.
    twin = (best[1] + 1) % len(detection.ANCHORS)
    twice = logits.at[twin, 7].set(4.5)
    there = offsets.at[twin].set(detection._encode(jnp.broadcast_to(BOXES[1], detection.ANCHORS.shape))[twin])
    assert detect(twice, there)[0] == 1.0
    # Elsewhere it is a false positive with the highest score: precision is 1/2, then 2/3.
    assert detect(logits.at[63, 1].set(9.0), offsets)[0] == pytest.approx(2 / 3)


def test_average_precision_is_the_area_under_the_envelope():
    scores = jnp.array([0.9, 0.8, 0.7, 0.6, -1.0])
    is_correct = jnp.array([False, True, False, True, True])
    # Precision 1/2 at recall 1/3 and 2/4 at 2/3; the suppressed detection is ignored.
    assert detection.average_precision(scores, is_correct, 3) == pytest.approx(1 / 3)
