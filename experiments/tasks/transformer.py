"""The transformer that all tasks on sequences share.

Source: A. Vaswani et al., "Attention Is All You Need", 2017. Here with the normalisation before each sublayer
and learned positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx

_HEADS, _EXPANSION = 4, 2  # defaults, used by all tasks


class Layer(nnx.Module):
    """Self-attention, optional cross-attention to an encoded sequence, and a feed-forward network."""

    def __init__(
        self,
        width: int,
        *,
        heads: int = _HEADS,
        expansion: int = _EXPANSION,
        cross: bool = False,
        rngs: nnx.Rngs,
    ):
        def attention() -> nnx.MultiHeadAttention:
            return nnx.MultiHeadAttention(heads, width, decode=False, keep_rngs=False, rngs=rngs)

        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = attention()
        self.norm_cross = nnx.LayerNorm(width, rngs=rngs) if cross else None
        self.cross = attention() if cross else None
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
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
        normed = self.norm_attention(hidden)
        hidden += self.attention(normed, mask=mask)
        if self.cross is not None:
            hidden += self.cross(self.norm_cross(hidden), encoded, mask=encoded_mask)
        return hidden + self.down(nnx.gelu(self.up(self.norm_mlp(hidden))))


class Transformer(nnx.Module):
    """Layers over token and position embeddings, with a final normalisation."""

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
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.layers = nnx.List(
            [Layer(width, heads=heads, expansion=expansion, cross=cross, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Features, shape (batch, length, width), of integer tokens of shape (batch, length)."""
        hidden = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden, mask, encoded, encoded_mask)
        return self.norm(hidden)


def padding_mask(tokens: jax.Array) -> jax.Array:
    """True for tokens other than padding (0), shape (batch, 1, 1, length)."""
    return (tokens != 0)[:, None, None, :]


def causal_mask(tokens: jax.Array) -> jax.Array:
    """True for keys up to the position of the query, shape (1, 1, length, length)."""
    length = tokens.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
