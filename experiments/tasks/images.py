"""Image data of the tasks, as float32."""

from pathlib import Path

import numpy as np

from experiments.data.digits import Digits
from experiments.data.loading import load_public, load_split
from experiments.tasks.base import Batch


def load_digits(split: str, data_dir: Path | None) -> Batch:
    """Loads one split of the 8x8 digits, scaled to [0, 1]."""
    examples = load_split(Digits, split, data_dir)
    return {"input": examples["image"].astype("float32") / 16, "label": examples["label"].astype("int32")}


def load_public_images(name: str, split: str, data_dir: Path | None, limit: int | None = None) -> Batch:
    """Loads at most ``limit`` examples of one split of a public data set, scaled to [-0.5, 0.5]."""
    examples = load_public(name, split, data_dir, limit)
    images = examples["image"].astype(np.float32) / 255 - 0.5
    return {"input": images, "label": examples["label"].astype(np.int32)}
