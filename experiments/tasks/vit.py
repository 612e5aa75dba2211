"""Image classification: a small vision transformer on the digits.

Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020. Here with the mean over the patches
instead of a class token.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.tasks.base import CLASSIFICATION, Task, module_task
from experiments.tasks.images import load_digits
from experiments.tasks.transformer import Layer

_PATCH, _WIDTH, _LAYERS = 2, 32, 2


class VisionTransformer(nnx.Module):
    """Two transformer layers over patches of 2x2 pixels."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(_PATCH * _PATCH, _WIDTH, rngs=rngs)
        positions = jax.random.normal(rngs.params(), ((size // _PATCH) ** 2, _WIDTH))
        self.positions = nnx.Param(0.02 * positions)
        self.layers = nnx.List([Layer(_WIDTH, rngs=rngs) for _ in range(_LAYERS)])
        self.norm = nnx.LayerNorm(_WIDTH, rngs=rngs)
        self.logits = nnx.Linear(_WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, shape (batch, 10), of images of shape (batch, size, size, 1)."""
        batch, size = images.shape[:2]
        side = size // _PATCH
        patches = images.reshape(batch, side, _PATCH, side, _PATCH).transpose(0, 1, 3, 2, 4)
        hidden = self.embed(patches.reshape(batch, side * side, -1)) + self.positions[...]
        for layer in self.layers:
            hidden = layer(hidden, jnp.ones((1, 1, 1, 1), bool))
        return self.logits(self.norm(hidden).mean(axis=1))


def make_digits(data_dir: Path | None = None) -> Task:
    """Digits: 16 patches of 2x2 pixels."""
    splits = (load_digits(split, data_dir) for split in ("train", "test"))
    return module_task(
        "digits-vit", lambda rngs: VisionTransformer(8, rngs=rngs), CLASSIFICATION, *splits, batch_size=32
    )
