"""The transformer that all tasks on sequences share.

Source: A. Vaswani et al., "Attention Is All You Need", 2017. Here with the normalisation before each sublayer
and learned positions; with :data:`BERT`, the normalisation follows each sublayer, as in J. Devlin et al.,
"BERT", 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

_HEADS, _EXPANSION = 4, 2  # defaults, used by all tasks


class Style(NamedTuple):
    """The details in which published transformers differ.

    Attributes:
      norm_first: whether the input of each sublayer and the result of the last layer are normalised;
        otherwise the embeddings, and the sum of the input and the output of each sublayer.
      approximate_gelu: whether the activation is the approximation of GELU by the hyperbolic tangent.
      epsilon: added to the variance in normalisations.
    """

    norm_first: bool = True
    approximate_gelu: bool = True
    epsilon: float = 1e-6


PRE_NORM, BERT = Style(), Style(norm_first=False, approximate_gelu=False, epsilon=1e-12)


class Layer(nnx.Module):
    """Self-attention, optional cross-attention to an encoded sequence, and a feed-forward network."""

    def __init__(
        self,
        width: int,
        *,
        heads: int = _HEADS,
        expansion: int = _EXPANSION,
        cross: bool = False,
        style: Style = PRE_NORM,
        rngs: nnx.Rngs,
    ):
        def attention() -> nnx.MultiHeadAttention:
            return nnx.MultiHeadAttention(heads, width, decode=False, keep_rngs=False, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(width, epsilon=style.epsilon, rngs=rngs)

        self.style = style
        self.norm_attention = norm()
        self.attention = attention()
        self.norm_cross = norm() if cross else None
        self.cross = attention() if cross else None
        self.norm_mlp = norm()
        self.up = nnx.Linear(width, expansion * width, rngs=rngs)
        self.down = nnx.Linear(expansion * width, width, rngs=rngs)

    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Maps shape (batch, length, width) to the same; masks have shape (batch, 1, queries or 1, keys)."""
        hidden = self._add(hidden, self.norm_attention, lambda x: self.attention(x, mask=mask))
        if self.cross is not None:
            hidden = self._add(hidden, self.norm_cross, lambda x: self.cross(x, encoded, mask=encoded_mask))
        return self._add(hidden, self.norm_mlp, self._mlp)

    def _add(self, hidden: jax.Array, norm: nnx.LayerNorm, sublayer: Callable[..., jax.Array]) -> jax.Array:
        """Adds the output of a sublayer to its input."""
        if self.style.norm_first:
            return hidden + sublayer(norm(hidden))
        return norm(hidden + sublayer(hidden))

    def _mlp(self, hidden: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(hidden), approximate=self.style.approximate_gelu))


class Transformer(nnx.Module):
    """Layers over token and position embeddings, with a normalisation of the result or of the embeddings."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        layers: int,
        *,
        heads: int = _HEADS,
        expansion: int = _EXPANSION,
        cross: bool = False,
        style: Style = PRE_NORM,
        rngs: nnx.Rngs,
    ):
        self.width, self.style = width, style
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.layers = nnx.List(
            [
                Layer(width, heads=heads, expansion=expansion, cross=cross, style=style, rngs=rngs)
                for _ in range(layers)
            ]
        )
        self.norm = nnx.LayerNorm(width, epsilon=style.epsilon, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Features, shape (batch, length, width), of integer tokens of shape (batch, length)."""
        hidden = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        if not self.style.norm_first:
            hidden = self.norm(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask, encoded, encoded_mask)
        return self.norm(hidden) if self.style.norm_first else hidden


def padding_mask(tokens: jax.Array) -> jax.Array:
    """True for tokens other than padding (0), shape (batch, 1, 1, length)."""
    return (tokens != 0)[:, None, None, :]


def causal_mask(tokens: jax.Array) -> jax.Array:
    """True for keys up to the position of the query, shape (1, 1, length, length)."""
    length = tokens.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def at_positions(hidden: jax.Array, positions: jax.Array | None) -> jax.Array:
    """The features at positions of shape (batch, n), shape (batch, n, width); all features for None."""
    return hidden if positions is None else jnp.take_along_axis(hidden, positions[..., None], axis=1)
