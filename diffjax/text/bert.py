"""BERT (Devlin et al., 2018) as an encoder of text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention
from diffjax.nn.layers import embedding, layer_norm
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat


class BertBlock(nn.Module):
    """Attention and MLP, each followed by its layer norm (post-LN)."""

    heads: int
    mlp: int
    norm_eps: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`x [batch, length, embed], mask [batch, length] -> [batch, length, embed]`."""
        y = Attention(self.heads, name="attention")(x, mask=mask)
        x = layer_norm(epsilon=self.norm_eps, name="attention_norm")(x + y)
        y = Mlp(self.mlp, "gelu", name="mlp")(x)
        x = layer_norm(epsilon=self.norm_eps, name="mlp_norm")(x + y)
        return constrain(x, "batch", "length", "embed")


class Bert(nn.Module):
    """BERT's encoder, float32, without dropout: it is never trained here.

    Attributes:
      vocab: size of the vocabulary.
      embed: width of the token states.
      layers: number of transformer layers.
      heads: number of attention heads.
      mlp: hidden width of the feed-forward layers.
      positions: the most tokens it can read.
      types: number of token types; only type 0 is used here.
      norm_eps: epsilon of the layer norms.
      scan: whether the loop over the layers is rolled.
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    mlp: int
    positions: int
    types: int = 2
    norm_eps: float = 1e-12
    scan: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode tokens.

        Args:
          ids: `[batch, length]` token ids, all of them type 0.
          mask: `[batch, length]` bool, True at real tokens; at least one per row.

        Returns:
          The last hidden states, `[batch, length, embed]`; without meaning where `mask` is False.
        """
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(f"{length} tokens, but this BERT has {self.positions} positions")
        x = embedding(self.vocab, self.embed, name="words")(ids)
        x += embedding(self.positions, self.embed, name="positions")(jnp.arange(length))
        x += embedding(self.types, self.embed, name="types")(jnp.zeros_like(ids))
        x = layer_norm(epsilon=self.norm_eps, name="norm")(x)
        block = BertBlock(self.heads, self.mlp, self.norm_eps, name="blocks")
        x, _ = repeat(block, self.layers, x, mask, scan=self.scan)
        return x
