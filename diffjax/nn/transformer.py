"""Transformer blocks modulated by a conditioning vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention
from diffjax.nn.layers import Dtype, constrain, dense, zeros
from diffjax.nn.mlp import Mlp


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift`; `x` is `[batch, length, embed]`, the others `[batch, embed]`."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """A conditioning vector to `count` vectors of width `features`; zero-initialised (adaLN-Zero)."""

    features: int
    count: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, vector: jax.Array) -> list[jax.Array]:
        """`[batch, any] -> count x [batch, features]`."""
        out = dense(self.features * self.count, kernel_init=zeros, dtype=self.dtype, name="dense")(
            nn.silu(vector)
        )
        return jnp.split(out, self.count, axis=-1)


class AdaLNZeroBlock(nn.Module):
    """DiT's block (Peebles and Xie, 2023): self-attention and MLP, each shifted, scaled and gated.

    With a `context` there is a cross-attention between the two, as in PixArt-alpha (Chen et al., 2023), whose
    output projection starts at zero.

    Attributes:
      heads: attention heads.
      mlp_ratio: width of the MLP over the width of the tokens.
      dtype: compute dtype; norms are taken in float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        vector: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Transform tokens.

        Args:
          x: `[batch, length, embed]`.
          vector: what modulates the block, `[batch, any]`.
          context: tokens to cross-attend to, `[batch, keys, any]`, or None.
          context_mask: `[batch, keys]` bool.

        Returns:
          `[batch, length, embed]`.
        """
        embed = x.shape[-1]
        modulation = Modulation(embed, 6, dtype=self.dtype, name="modulation")(vector)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation

        y = modulate(self._norm("norm_attention")(x), shift_a, scale_a)
        x = x + gate_a[:, None] * Attention(self.heads, dtype=self.dtype, name="attention")(y)
        if context is not None:
            cross = Attention(self.heads, dtype=self.dtype, out_init=zeros, name="cross_attention")
            x = x + cross(self._norm("norm_cross")(x), context, context_mask)

        y = modulate(self._norm("norm_mlp")(x), shift_m, scale_m)
        y = Mlp(int(embed * self.mlp_ratio), dtype=self.dtype, name="mlp")(y)
        return constrain(x + gate_m[:, None] * y, "batch", "length", "embed")

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6, dtype=self.dtype, name=name)
