"""Attention in the U-Nets of public models: over a feature map, with text among the keys or in layers.

Feature maps are `[batch, height, width, channels]`, text is `[batch, length, embed]`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention, heads_of
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, dense, group_norm, layer_norm, zeros
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat
from diffjax.nn.resblock import FEATURE_MAP

TOKENS = ("batch", "length", "embed")


class MapAttention(nn.Module):
    """Attention of every place of a feature map to every other and, given text, to its tokens at once.

    Without text it is DDPM's (Ho et al., 2020); with text it is GLIDE's (Nichol et al., 2021) and DeepFloyd
    IF's.

    Attributes:
      heads: number of heads; the width of the feature map must be divisible by it.
      groups: of the norm of the feature map; 0: there is none.
      epsilon: of that norm.
      text_groups: of a norm of the text; 0: there is none.
      text_only: attend to the text alone.
      divisor: of the sum of skip and branch.
      dtype: compute dtype.
    """

    heads: int
    groups: int = 32
    epsilon: float = 1e-5
    text_groups: int = 0
    text_only: bool = False
    divisor: float = 1.0
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attend.

        Args:
          x: the feature map.
          text: tokens that are keys too, or None.
          mask: `[batch, length]` bool, False at tokens that must not be seen.

        Returns:
          a feature map like `x`.
        """
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise ValueError(f"width {channels} is not divisible by {self.heads} heads")
        h = x.reshape(batch, height * width, channels)
        if self.groups:
            h = group_norm(self.groups, epsilon=self.epsilon, name="norm")(h)

        def project(source: jax.Array, *names: str) -> list[jax.Array]:
            return heads_of(source, names, self.heads, channels // self.heads, dtype=self.dtype)

        pairs = []
        if text is not None:
            if self.text_groups:
                text = group_norm(self.text_groups, epsilon=1e-5, name="text_norm")(text)
            pairs.append(project(text, "text_key", "text_value"))
        if text is not None and self.text_only:
            (query,) = project(h, "query")
        else:
            query, *pair = project(h, "query", "key", "value")
            pairs.append(pair)
            if mask is not None:
                mask = jnp.concatenate([mask, jnp.ones((batch, height * width), bool)], axis=1)
        key, value = (jnp.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
        h = attend(query, key, value, mask=mask if text is not None else None).reshape(h.shape)
        h = dense(channels, axes=("heads", "embed"), kernel_init=zeros, dtype=self.dtype, name="out")(h)
        y = x + h.reshape(x.shape)
        return constrain(y if self.divisor == 1.0 else y / self.divisor, *FEATURE_MAP)


class TransformerLayer(nn.Module):
    """Self-attention, attention to text, and a gated feed-forward layer, each pre-normed and residual.

    Attributes:
      heads: number of heads.
      text_only: the first attention is to the text, too; to all of it, whatever `mask` is.
      dtype: compute dtype; the norms are taken in float32.
    """

    heads: int
    text_only: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, embed]`, told `text` and its `mask`."""
        attention = {"use_bias": False, "dtype": self.dtype}
        first = Attention(self.heads, **attention, name="attention")
        x = x + first(self._norm("norm_attention")(x), text if self.text_only else None)
        cross = Attention(self.heads, **attention, name="cross_attention")
        x = x + cross(self._norm("norm_cross")(x), text, mask)
        mlp = Mlp(4 * x.shape[-1], "gelu", gated=True, dtype=self.dtype, name="mlp")
        return constrain(x + mlp(self._norm("norm_mlp")(x)), *TOKENS)

    def _norm(self, name: str) -> nn.LayerNorm:
        return layer_norm(epsilon=1e-5, dtype=jnp.float32, name=name)


class SpatialTransformer(nn.Module):
    """Transformer layers over the places of a feature map, between two projections (Rombach et al., 2022).

    Attributes:
      heads: number of heads.
      depth: number of layers.
      groups: of the norm.
      text_only: see `TransformerLayer`.
      scan: see `diffjax.nn.repeat.repeat`.
      remat: see `diffjax.nn.repeat.REMAT`.
      dtype: compute dtype.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    text_only: bool = False
    scan: bool = True
    remat: str = ""
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """A feature map to one like it, told `text` and its `mask`, `[batch, length]` bool."""
        batch, height, width, channels = x.shape
        h = group_norm(self.groups, epsilon=1e-6, name="norm")(x).reshape(batch, height * width, channels)
        h = dense(channels, dtype=self.dtype, name="in")(h)
        layer = TransformerLayer(self.heads, self.text_only, self.dtype, name="layers")
        h, _ = repeat(layer, self.depth, h, text, mask, scan=self.scan, remat=self.remat)
        h = dense(channels, axes=("features", "embed"), kernel_init=zeros, dtype=self.dtype, name="out")(h)
        return constrain(x + h.reshape(x.shape), *FEATURE_MAP)
