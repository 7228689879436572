"""FLUX.1, the rectified-flow transformer of Black Forest Labs (2024)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import heads_of
from diffjax.nn.conditioning import Cond
from diffjax.nn.joint import JointBlock, Output, VectorEmbedding, norm, text_of
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, dense
from diffjax.nn.mlp import ACTIVATIONS
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat
from diffjax.nn.rotary import Rotary, rotary
from diffjax.nn.transformer import Modulation, modulate

SIZES: dict[str, dict[str, Any]] = {
    "flux1_dev": {"guidance": True},
    "flux1_schnell": {"guidance": False},
}
"""Attributes of published sizes."""


class SingleBlock(nn.Module):
    """A block in which attention and MLP see the same input (Dehghani et al., 2023), shifted, scaled, gated.

    Attributes:
      heads: attention heads.
      head_dim: width of each; the tokens have the width of all together.
      dtype: compute dtype.
    """

    heads: int
    head_dim: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, vector: jax.Array, positions: Rotary) -> jax.Array:
        """Transform tokens.

        Args:
          x: text and image, `[batch, words + length, embed]`.
          vector: what modulates the block, `[batch, any]`.
          positions: of the tokens.
        """
        embed = x.shape[-1]
        shift, scale, gate = Modulation(embed, 3, dtype=self.dtype, name="modulation")(vector)
        y = modulate(norm(x, self.dtype), shift, scale)

        names = ("query", "key", "value")
        seen = attend(
            *heads_of(y, names, self.heads, self.head_dim, norm="rms", rotary=positions, dtype=self.dtype)
        )
        hidden = dense(4 * embed, axes=("embed", "mlp"), dtype=self.dtype, name="mlp")(y)
        both = jnp.concatenate([seen.reshape(*x.shape[:-1], -1), ACTIVATIONS["gelu_tanh"](hidden)], axis=-1)
        y = dense(embed, axes=("mlp", "embed"), dtype=self.dtype, name="out")(both)
        return constrain(x + gate[:, None] * y, "batch", "length", "embed")


class Flux(nn.Module):
    """MMDiT's blocks of two streams, then blocks of one, with rotary positions of the image's patches.

    All tokens of the text count: the null condition is the encoding of an empty caption, not a mask. The
    attributes' defaults are those of FLUX.1 schnell.

    Attributes:
      depth: number of blocks with two streams.
      single_depth: number of blocks with one.
      heads: attention heads.
      head_dim: width of each; the tokens are `heads * head_dim` wide.
      rope_dims: how many features of a head the axes turn: one that is always zero, row and column.
      patch: side of a patch.
      in_channels: channels of the image (64 once packed); what a fill or depth model is told besides, too.
      out_channels: channels of the prediction.
      text_embed: width of the text's tokens.
      pooled_embed: width of the pooled text.
      guidance: whether the network is told a guidance scale, `cond.guidance` (FLUX.1 dev, distilled).
      time_input: what number the noise level is; see `diffjax.nn.embeddings.to_thousand`.
      dtype: compute dtype; parameters and output are float32.
      remat: what is kept for the backward pass; see `diffjax.nn.repeat.REMAT`.
      scan: whether alike blocks are one loop.
    """

    depth: int = 19
    single_depth: int = 38
    heads: int = 24
    head_dim: int = 128
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    patch: int = 2
    in_channels: int = 16
    out_channels: int = 16
    text_embed: int = 4096
    pooled_embed: int = 768
    guidance: bool = False
    time_input: str = "timestep"
    dtype: Dtype = jnp.float32
    remat: str = ""
    scan: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, in_channels]`; of any ratio.
          level: their noise level, `[batch]`; FLUX is told 1000 times the time.
          cond: with text, pooled text and, where the network is told it, the guidance scale, such as 3.5.
          deterministic: there is no dropout; ignored.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        del deterministic
        height, width, channels = x.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"images have {channels} channels; expected {self.in_channels}")
        if self.guidance and cond.guidance is None:
            raise ValueError("this network is told a guidance scale: cond.guidance")
        text, pooled = text_of(cond, self.text_embed, self.pooled_embed)
        embed, words = self.heads * self.head_dim, text.shape[1]
        vector = VectorEmbedding(embed, self.time_input, dtype=self.dtype, name="vector")(
            level, pooled, cond.guidance if self.guidance else None
        )
        context = dense(embed, axes=("features", "embed"), dtype=self.dtype, name="context_in")(text)
        tokens = patchify(x, self.patch, channel_first=True)
        h = dense(embed, axes=("patch", "embed"), dtype=self.dtype, name="patch_in")(tokens)
        h, context = (constrain(y, "batch", "length", "embed") for y in (h, context))
        positions = self._positions(words, height // self.patch, width // self.patch)

        double = JointBlock(self.heads, self.head_dim, "rms", dtype=self.dtype, name="double")
        single = SingleBlock(self.heads, self.head_dim, dtype=self.dtype, name="single")
        loop: dict[str, Any] = {"scan": self.scan, "remat": self.remat}
        (h, context), _ = repeat(double, self.depth, (h, context), vector, positions, **loop)
        h, _ = repeat(
            single, self.single_depth, jnp.concatenate([context, h], axis=1), vector, positions, **loop
        )
        out = Output(self.patch**2 * self.out_channels, dtype=self.dtype, name="out")(h[:, words:], vector)
        return unpatchify(out, self.patch, height, width, channel_first=True)

    def _positions(self, words: int, rows: int, columns: int) -> Rotary:
        """Of the words, all at zero, and the patches."""
        if sum(self.rope_dims) != self.head_dim:
            raise ValueError(f"rope_dims {self.rope_dims} are {self.head_dim} features only in sum")
        grid = jnp.indices((1, rows, columns)).reshape(3, -1).T
        return rotary(jnp.concatenate([jnp.zeros((words, 3), grid.dtype), grid]), self.rope_dims)
