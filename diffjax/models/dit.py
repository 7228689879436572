"""The diffusion transformer in pixel space, conditioned on text (Peebles and Xie, 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond, TextProjection
from diffjax.nn.embeddings import NoiseLevelEmbedding, sincos_positions_2d
from diffjax.nn.layers import Dtype, constrain, dense, zeros
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.transformer import AdaLNZeroBlock, Modulation, modulate


class DiT(nn.Module):
    """A transformer over image patches whose blocks are modulated by noise level and pooled text.

    Text tokens enter by cross-attention where `cross_attention` is set. A low-resolution image, if there is
    one, is concatenated to the channels, and its noise level is added to the conditioning vector.

    Attributes:
      patch: side of a patch in pixels.
      embed: width of the tokens; divisible by `heads` and by 4.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `embed`.
      cross_attention: whether blocks attend to the text tokens.
      out_channels: channels of the prediction.
      dtype: compute dtype; parameters and output are float32.
      remat: recompute the blocks in the backward pass, to save memory.
    """

    patch: int = 2
    embed: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    cross_attention: bool = True
    out_channels: int = 3
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, channels]`.
          logsnr: their noise level, `[batch]`.
          cond: the conditions.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        height, width = x.shape[1:3]
        tokens, mask, vector = TextProjection(self.embed, dtype=self.dtype, name="text")(cond)
        vector = vector + NoiseLevelEmbedding(self.embed, dtype=self.dtype, name="noise_level")(logsnr)
        if cond.low_res is not None:
            x = jnp.concatenate([x, cond.low_res.astype(x.dtype)], axis=-1)
            vector = vector + NoiseLevelEmbedding(self.embed, dtype=self.dtype, name="aug_level")(
                cond.aug_level
            )

        h = dense(self.embed, axes=("patch", "embed"), dtype=self.dtype, name="patch_in")(
            patchify(x, self.patch)
        )
        h = h + sincos_positions_2d(height // self.patch, width // self.patch, self.embed).astype(h.dtype)
        h = constrain(h, "batch", "length", "embed")
        block = nn.remat(AdaLNZeroBlock) if self.remat else AdaLNZeroBlock
        for i in range(self.depth):
            h = block(self.heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(
                h, vector, *((tokens, mask) if self.cross_attention else ())
            )

        shift, scale = Modulation(self.embed, 2, dtype=self.dtype, name="final_modulation")(vector)
        h = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6, dtype=self.dtype, name="final_norm")(
            h
        )
        h = dense(
            self.patch**2 * self.out_channels, axes=("embed", "patch"), kernel_init=zeros, name="patch_out"
        )(modulate(h, shift, scale).astype(jnp.float32))
        return unpatchify(h, self.patch, height, width)
