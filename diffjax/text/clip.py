"""The text encoder of CLIP (Radford et al., 2021), as Stable Diffusion, SDXL, SD3 and FLUX use it."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention
from diffjax.nn.layers import Dtype, dense, embedding, layer_norm
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat

HIGHEST_ID = 2
"""The `eos` that stands for the token of the highest id: what old configurations say, whatever theirs is."""


class ClipStates(NamedTuple):
    """What CLIP makes of a text.

    Attributes:
      states: what comes out of the last block, or of an earlier one, `[batch, length, embed]`, float32.
      normed: the same after the final norm.
      pooled: the last states, normed, of the token that ends the text, projected if there is a projection,
        `[batch, projection or embed]`, float32.
    """

    states: jax.Array
    normed: jax.Array
    pooled: jax.Array


class ClipBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, after a layer norm each."""

    heads: int
    mlp: int
    activation: str
    norm_eps: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], mask: jax.Array | None, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Transform tokens; keep what comes out where `wanted`.

        Args:
          carry: the states and those that are kept so far, `[batch, length, embed]`.
          mask: `[batch, length]` bool, or None.
          wanted: a bool.
        """
        x, kept = carry

        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            return layer_norm(epsilon=self.norm_eps, dtype=self.dtype, name=name)

        attention = Attention(self.heads, dtype=self.dtype, name="attention")
        x = x + attention(norm("attention_norm")(x), mask=mask, causal=True)
        mlp = Mlp(self.mlp, self.activation, dtype=self.dtype, name="mlp")
        x = constrain(x + mlp(norm("mlp_norm")(x)), "batch", "length", "embed")
        return x, jnp.where(wanted, x, kept)


class ClipText(nn.Module):
    """Token ids to states and a pooled vector.

    Attributes:
      vocab: size of the vocabulary.
      embed: width of the token states.
      layers: number of blocks.
      heads: attention heads.
      mlp: hidden width of the feed-forward layers.
      positions: the most tokens it can read.
      activation: "quick_gelu" in OpenAI's, "gelu" in OpenCLIP's.
      norm_eps: epsilon of the norms.
      projection: width of the pooled vector's projection; 0: there is none.
      eos: id of the token that ends a text, or `HIGHEST_ID`.
      dtype: compute dtype; the residual stream is float32.
      remat: see `nn.repeat.REMAT`.
      scan: whether the loop over the blocks is rolled.
    """

    vocab: int = 49408
    embed: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    positions: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection: int = 0
    eos: int = HIGHEST_ID
    dtype: Dtype = jnp.float32
    remat: str = ""
    scan: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None, *, skip: int = 0) -> ClipStates:
        """Encode tokens.

        Args:
          ids: `[batch, length]` token ids, with one that ends the text in each row.
          mask: `[batch, length]` bool, or None: padding, which comes last, is hidden from the text by the
            causal attention alone, as in all pipelines that use CLIP.
          skip: how many of the last blocks `states` leaves out; 1 gives the penultimate states.
        """
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(f"{length} tokens, but this CLIP has {self.positions} positions")
        if not 0 <= skip <= self.layers:
            raise ValueError(f"{skip} blocks cannot be left out of {self.layers}")
        x = embedding(self.vocab, self.embed, name="tokens")(ids)
        x = x + embedding(self.positions, self.embed, name="positions")(jnp.arange(length))
        x = constrain(x.astype(jnp.float32), "batch", "length", "embed")
        block = ClipBlock(self.heads, self.mlp, self.activation, self.norm_eps, self.dtype, name="blocks")
        wanted = jnp.arange(self.layers) == self.layers - 1 - skip
        (x, kept), _ = repeat(block, self.layers, (x, x), mask, each=wanted, scan=self.scan, remat=self.remat)
        norm = layer_norm(epsilon=self.norm_eps, name="norm")
        is_end = ids if self.eos == HIGHEST_ID else ids == self.eos
        end = jnp.argmax(is_end, axis=1)[:, None, None]  # the first, since it may also be the padding
        pooled = norm(jnp.take_along_axis(x, end, axis=1)[:, 0])
        if self.projection:
            pooled = dense(self.projection, use_bias=False, name="projection")(pooled)
        return ClipStates(kept, norm(kept), pooled)
