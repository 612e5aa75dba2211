"""Object detection: a small RetinaNet on the digit scenes.

Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017. Here with a feature pyramid of two
levels, one square anchor per position, heads shared by the levels, a focal loss for the classes and a smooth
L1 loss for the boxes, both divided by the number of positive anchors.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.loading import load_split
from experiments.data.scenes import CANVAS, DigitScenes
from experiments.tasks.base import Batch, Objective, Task, module_task
from experiments.tasks.convolution import convolution

CLASSES = 10
_LEVELS = ((4, 8), (8, 16))  # stride and size of the anchors, pixels
_WIDTH = 24
_POSITIVE, _NEGATIVE = 0.5, 0.4  # minimum IoU of a positive anchor, maximum IoU of a negative one
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss
_PRIOR = 0.01  # initial probability of an object at an anchor
_SAME_OBJECT = 0.5  # IoU threshold of non-maximum suppression and of a correct detection


def _anchors() -> np.ndarray:
    """All anchors as boxes, shape (anchors, 4)."""
    boxes = []
    for stride, size in _LEVELS:
        centres = np.arange(stride / 2, CANVAS, stride)
        rows, columns = np.meshgrid(centres, centres, indexing="ij")
        middle = np.stack([rows, columns], axis=-1).reshape(-1, 2)
        boxes.append(np.concatenate([middle - size / 2, middle + size / 2], axis=1))
    return np.concatenate(boxes).astype(np.float32)


ANCHORS = _anchors()


class RetinaNet(nnx.Module):
    """Predicts class logits and box offsets at each anchor."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = {"rngs": rngs, "conv_general_dilated": convolution}
        self.stem = nnx.Conv(1, 8, (3, 3), **conv)
        self.half = nnx.Conv(8, 16, (3, 3), strides=2, **conv)
        self.quarter = nnx.Conv(16, _WIDTH, (3, 3), strides=2, **conv)
        self.eighth = nnx.Conv(_WIDTH, _WIDTH, (3, 3), strides=2, **conv)
        self.lateral = nnx.Conv(_WIDTH, _WIDTH, (1, 1), **conv)
        self.class_tower = nnx.Conv(_WIDTH, _WIDTH, (3, 3), **conv)
        self.box_tower = nnx.Conv(_WIDTH, _WIDTH, (3, 3), **conv)
        prior = nnx.initializers.constant(-np.log((1 - _PRIOR) / _PRIOR))
        self.classes = nnx.Conv(_WIDTH, CLASSES, (1, 1), bias_init=prior, **conv)
        self.boxes = nnx.Conv(_WIDTH, 4, (1, 1), **conv)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shapes (batch, anchors, classes) and (batch, anchors, 4)."""
        hidden = nnx.relu(self.half(nnx.relu(self.stem(images))))
        fine = nnx.relu(self.quarter(hidden))
        coarse = nnx.relu(self.eighth(fine))
        from_above = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        logits, offsets = [], []
        for level in (self.lateral(fine) + from_above, coarse):
            batch = len(level)
            logits.append(self.classes(nnx.relu(self.class_tower(level))).reshape(batch, -1, CLASSES))
            offsets.append(self.boxes(nnx.relu(self.box_tower(level))).reshape(batch, -1, 4))
        return jnp.concatenate(logits, axis=1), jnp.concatenate(offsets, axis=1)


def overlap(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """Intersection over union (IoU) of every pair, shape (boxes, others).

    Examples:
      >>> float(overlap(jnp.array([[0.0, 0, 2, 2]]), jnp.array([[0.0, 1, 2, 3]]))[0, 0])  # 2 of 6
      0.333...
    """
    low = jnp.maximum(boxes[:, None, :2], others[None, :, :2])
    high = jnp.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    areas = [jnp.prod(each[:, 2:] - each[:, :2], axis=-1) for each in (boxes, others)]
    return intersection / jnp.maximum(areas[0][:, None] + areas[1][None] - intersection, 1e-6)


def _encode(boxes: jax.Array) -> jax.Array:
    """Encodes boxes, one per anchor: offset of the centre and log of the size, in units of the anchor."""
    size, middle = ANCHORS[:, 2:] - ANCHORS[:, :2], (ANCHORS[:, 2:] + ANCHORS[:, :2]) / 2
    box_size, box_middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    return jnp.concatenate(
        [(box_middle - middle) / size, jnp.log(jnp.maximum(box_size, 1e-3) / size)], axis=1
    )


def _decode(offsets: jax.Array) -> jax.Array:
    """The inverse of :func:`_encode`; log sizes are clipped to [-4, 4]."""
    size, middle = ANCHORS[:, 2:] - ANCHORS[:, :2], (ANCHORS[:, 2:] + ANCHORS[:, :2]) / 2
    box_middle = offsets[:, :2] * size + middle
    box_size = size * jnp.exp(jnp.clip(offsets[:, 2:], -4, 4))
    return jnp.concatenate([box_middle - box_size / 2, box_middle + box_size / 2], axis=1)


def _loss_of_image(
    logits: jax.Array, offsets: jax.Array, boxes: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of both losses, and the number of positive anchors."""
    overlaps = jnp.where(labels[None] >= 0, overlap(ANCHORS, boxes), -1.0)
    best = overlaps.max(axis=1)
    # The best anchor of an object is positive even if its IoU is below the threshold.
    is_best = jnp.any((overlaps == overlaps.max(axis=0)) & (overlaps > 0), axis=1)
    positive, negative = (best >= _POSITIVE) | is_best, (best < _NEGATIVE) & ~is_best
    owner = overlaps.argmax(axis=1)
    targets = jax.nn.one_hot(labels[owner], CLASSES) * positive[:, None]
    focal = optax.sigmoid_focal_loss(logits, targets, alpha=_ALPHA, gamma=_GAMMA).sum(axis=1)
    smooth_l1 = optax.huber_loss(offsets, _encode(boxes[owner])).sum(axis=1)
    total = jnp.sum(jnp.where(positive | negative, focal, 0)) + jnp.sum(jnp.where(positive, smooth_l1, 0))
    return total, jnp.sum(positive)


def _loss(module: RetinaNet, batch: Batch) -> jax.Array:
    losses, counts = jax.vmap(_loss_of_image)(*module(batch["input"]), batch["boxes"], batch["labels"])
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1)


def _detect(
    logits: jax.Array, offsets: jax.Array, boxes: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Detections of an image after non-maximum suppression, in descending order of score.

    Returns:
      Scores, -1 for suppressed detections, and whether each detection is correct.
    """
    scores, classes, detected = jax.nn.sigmoid(logits.max(axis=1)), logits.argmax(axis=1), _decode(offsets)
    between, to_truth = overlap(detected, detected), overlap(detected, boxes)
    order = jnp.argsort(-scores)

    def visit(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple, tuple]:
        selected, matched = carry
        is_selected = ~jnp.any(selected & (between[index] > _SAME_OBJECT))
        fits = (to_truth[index] >= _SAME_OBJECT) & (labels == classes[index]) & ~matched
        which = jnp.argmax(jnp.where(fits, to_truth[index], -1.0))
        is_correct = is_selected & jnp.any(fits)
        carry = selected.at[index].set(is_selected), matched.at[which].set(matched[which] | is_correct)
        return carry, (jnp.where(is_selected, scores[index], -1.0), is_correct)

    start = jnp.zeros(len(scores), bool), jnp.zeros(len(labels), bool)
    return jax.lax.scan(visit, start, order)[1]


def average_precision(scores: jax.Array, is_correct: jax.Array, num_objects: jax.Array) -> jax.Array:
    """Average precision: area under the precision-recall curve, as in the Pascal VOC challenge since 2010.

    Args:
      scores: scores of the detections, shape (n,); detections with a negative score are ignored.
      is_correct: whether each detection is correct, shape (n,).
      num_objects: number of objects.

    Examples:
      >>> float(average_precision(jnp.array([0.9, 0.8, 0.7]), jnp.array([True, False, True]), 2))
      0.833...
    """
    order = jnp.argsort(-scores)
    counted = (scores >= 0)[order]
    hits = jnp.cumsum(is_correct[order] & counted)
    precision = hits / jnp.maximum(jnp.cumsum(counted), 1)
    envelope = jax.lax.cummax(precision, reverse=True)
    return jnp.sum(jnp.where(is_correct[order] & counted, envelope, 0)) / jnp.maximum(num_objects, 1)


def _ap50(module: RetinaNet, batch: Batch) -> jax.Array:
    """Average precision at an IoU of 0.5, over all classes together."""
    scores, is_correct = jax.vmap(_detect)(*module(batch["input"]), batch["boxes"], batch["labels"])
    return average_precision(scores.ravel(), is_correct.ravel(), jnp.sum(batch["labels"] >= 0))


def make(data_dir: Path | None = None) -> Task:
    """Detection of the digits in 32x32 scenes."""

    def load(split: str) -> Batch:
        scenes = load_split(DigitScenes, split, data_dir)
        image = scenes["image"].astype("float32") / 16
        return {"input": image, "boxes": scenes["boxes"], "labels": scenes["labels"]}

    return module_task(
        "detection",
        lambda rngs: RetinaNet(rngs=rngs),
        Objective(_loss, _ap50, "AP50"),
        load("train"),
        load("test"),
        batch_size=16,
    )
