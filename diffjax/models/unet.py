"""Imagen's U-Nets: the base network and the Efficient U-Net of the super-resolution stages.

Both are one network (Saharia et al. 2022, arXiv:2205.11487, section 2.4 and appendix B); what differs is
where its work is done:

- resolution: the base network's first level works at the full resolution, the efficient one's at half of it,
  where every level downsamples before its convolutions and upsamples after them: only the first and the last,
  narrow, convolutions see every pixel.
- skips: the base network concatenates one for every block; the efficient one adds one for every level, scaled
  by 1/sqrt(2).
- attention: after every block and in the middle; in the efficient network once a level, after its blocks.
- widths: on the way up a level of the efficient network is as wide as the next higher-resolution level on the
  way down, whose skip it will meet.

Published configurations, in the numbers of NVIDIA's Imagen recipes (NeMo); `FTTT` has one flag a level:

=====================  ==========  =============  =============  =============
attribute              base64-500m  sr256-400m    sr256-600m     sr1024-600m
=====================  ==========  =============  =============  =============
resolution             64          64 to 256      64 to 256      256 to 1024
`channels`             256         128            128            128
`multipliers`          1, 2, 3, 4  1, 2, 4, 6, 6  1, 2, 4, 8, 8  1, 2, 4, 8, 8
`blocks`               3, 3, 3, 3  2, 2, 3, 4, 3  2, 4, 8, 8, 8  2, 4, 8, 8, 8
`strides`              default     default        2, 2, 2, 2, 1  2, 2, 2, 2, 1
`self_attention`       FTTT        FFFTT          FFFTT          FFFFF
`cross_attention`      FTTT        FFFTT          FFFTT          FFFTT
`efficient`            False       False          True           True
=====================  ==========  =============  =============  =============

Without self-attention (sr1024) the network accepts any resolution and is trained on 256-pixel crops. The
networks named efficient in the Imagen paper have four levels: 1, 2, 4, 8 with 2, 4, 8, 8 blocks and attention
in the last.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond, TextProjection
from diffjax.nn.embeddings import NoiseLevelEmbedding
from diffjax.nn.layers import Dtype, constrain, conv, zeros
from diffjax.nn.resblock import (
    FEATURE_MAP,
    AttentionBlock,
    Downsample,
    ModulatedNorm,
    ResBlock,
    Upsample,
    add_scaled,
)


class UNet(nn.Module):
    """A text-conditional U-Net for a base stage or, given `cond.low_res`, for super-resolution.

    Attributes:
      channels: width that the multipliers multiply; the conditioning vector and the text tokens are four
        times as wide.
      multipliers: width of each level over `channels`, highest resolution first.
      blocks: residual blocks of each level on the way down (the base network has one more on the way up).
      self_attention: which levels attend to their own feature map.
      cross_attention: which levels attend to the text tokens. If none does, text still enters through the
        conditioning vector, and the projection of the tokens is unused.
      head_dim: width of an attention head; a level of width w has max(1, w // head_dim) heads.
      strides: by what each level divides the resolution on entry; empty for the usual (1, 2, 2, ...), and
        (2, 2, 2, ...) if `efficient`.
      efficient: see the module's docstring.
      dropout: rate inside the residual blocks.
      out_channels: channels of the prediction.
      dtype: compute dtype; norms and the last convolution are always float32.
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    self_attention: tuple[bool, ...] = (False, True, True, True)
    cross_attention: tuple[bool, ...] = (False, True, True, True)
    head_dim: int = 64
    strides: tuple[int, ...] = ()
    efficient: bool = False
    dropout: float = 0.0
    out_channels: int = 3
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, logsnr: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, channels]`.
          logsnr: their noise level, `[batch]`.
          cond: text and, in a super-resolution stage, the low-resolution images.
          deterministic: False in training; draws from the `dropout` rng if `dropout` is not zero.

        Returns:
          The prediction, `[batch, height, width, out_channels]`, float32.
        """
        levels = range(len(self.multipliers))
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        strides = self.strides or ((2,) if self.efficient else (1,)) + (2,) * (len(levels) - 1)
        self._check_levels(strides)
        self._check_images(x, cond, math.prod(strides))
        tokens, mask, vector = self._condition(logsnr, cond)
        dropout = 0.0 if deterministic else self.dropout
        res_block, attention_block = ResBlock, AttentionBlock
        if self.remat:
            res_block, attention_block = nn.remat(ResBlock), nn.remat(AttentionBlock)

        def transform(h: jax.Array, width: int, name: str) -> jax.Array:
            return res_block(width, dropout, dtype=self.dtype, name=f"{name}_res")(h, vector)

        def attend(h: jax.Array, level: int, name: str) -> jax.Array:
            over = (self.self_attention[level], self.cross_attention[level])
            if not any(over):
                return h
            heads = self._heads(h.shape[-1], level)
            return attention_block(heads, *over, self.dtype, name=f"{name}_attention")(h, tokens, mask)

        if cond.low_res is not None:
            x = jnp.concatenate([x, cond.low_res.astype(x.dtype)], axis=-1)
        h = conv(widths[0], dtype=self.dtype, name="in")(x)
        h = entry = constrain(h, *FEATURE_MAP)

        skips = []  # for each level, the feature maps that its way up will need
        for level in levels:
            if strides[level] > 1:
                width = widths[level] if self.efficient else h.shape[-1]
                h = Downsample(width, strides[level], dtype=self.dtype, name=f"down_{level}")(h)
            skips.append([h])
            for block in range(self.blocks[level]):
                h = transform(h, widths[level], f"down_{level}_{block}")
                if not self.efficient:
                    h = attend(h, level, f"down_{level}_{block}")
                skips[level].append(h)
            if self.efficient:
                h = attend(h, level, f"down_{level}")
                skips[level] = [h]

        if not self.efficient:
            h = transform(h, widths[-1], "middle_0")
            h = attend(h, levels[-1], "middle")
            h = transform(h, widths[-1], "middle_1")

        for level in reversed(levels):
            if self.efficient:
                if level != levels[-1]:  # the last level's skip is `h` itself
                    h = add_scaled(h, skips[level].pop())
                for block in range(self.blocks[level]):
                    h = transform(h, widths[max(level - 1, 0)], f"up_{level}_{block}")
                h = attend(h, level, f"up_{level}")
            else:
                for block in range(self.blocks[level] + 1):
                    h = jnp.concatenate([h, skips[level].pop()], axis=-1)
                    h = transform(h, widths[level], f"up_{level}_{block}")
                    h = attend(h, level, f"up_{level}_{block}")
            if strides[level] > 1:
                h = Upsample(h.shape[-1], strides[level], self.dtype, name=f"up_{level}")(h)

        if strides[0] > 1:
            h = add_scaled(h, entry)
        # Modulated, because in the efficient network only this layer can weigh the noisy image, which the
        # entry brings here at full resolution, by its noise level.
        h = nn.silu(ModulatedNorm(dtype=self.dtype, name="norm_out")(h, vector))
        h = conv(self.out_channels, kernel_init=zeros, dtype=jnp.float32, name="out")(h)
        return constrain(h, *FEATURE_MAP)

    def _condition(self, logsnr: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Text tokens `[b, 1 + length, embed]`, their mask, and the conditioning vector `[b, embed]`."""
        embed = 4 * self.channels
        tokens, mask, vector = TextProjection(embed, dtype=self.dtype, name="text")(cond)
        vector = vector + NoiseLevelEmbedding(embed, dtype=self.dtype, name="noise_level")(logsnr)
        if cond.aug_level is not None:
            vector = vector + NoiseLevelEmbedding(embed, dtype=self.dtype, name="aug_level")(cond.aug_level)
        return tokens, mask, vector

    def _check_levels(self, strides: tuple[int, ...]) -> None:
        """Refuse attributes that contradict each other."""
        for name in ("blocks", "self_attention", "cross_attention", "strides"):
            given = strides if name == "strides" else getattr(self, name)
            if len(given) != len(self.multipliers):
                raise ValueError(
                    f"{name} has {len(given)} entries, {given}; expected one for each of the "
                    f"{len(self.multipliers)} multipliers {self.multipliers}"
                )
        if min(self.blocks, default=0) < 1 or min(strides) < 1:
            raise ValueError(f"every level needs a block and a stride; got {self.blocks} and {strides}")

    def _heads(self, width: int, level: int) -> int:
        """The number of attention heads of a feature map `width` wide."""
        heads = max(1, width // self.head_dim)
        if width % heads:
            raise ValueError(
                f"level {level} attends in a feature map {width} wide, which the {heads} heads that "
                f"head_dim={self.head_dim} makes do not divide; choose a head_dim that divides the width"
            )
        return heads

    def _check_images(self, x: jax.Array, cond: Cond, stride: int) -> None:
        """Refuse images that do not fit the network or each other."""
        height, width = x.shape[1:3]
        if height % stride or width % stride:
            raise ValueError(
                f"images of {height}x{width} pixels; this network divides the resolution by {stride}, so "
                f"expected multiples of {stride}"
            )
        if cond.low_res is not None and cond.low_res.shape[:3] != x.shape[:3]:
            raise ValueError(
                f"cond.low_res has shape {cond.low_res.shape}; expected it upsampled to the images' own "
                f"resolution, {x.shape[:3]} and its channels"
            )
