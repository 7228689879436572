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

Without self-attention (sr1024 of `SIZES`) it accepts any resolution and is trained on 256-pixel crops.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond, TextProjection
from diffjax.nn.embeddings import NoiseLevelEmbedding
from diffjax.nn.layers import Dtype, conv, zeros
from diffjax.nn.levels import ascend, descend
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import once
from diffjax.nn.resblock import (
    FEATURE_MAP,
    AttentionBlock,
    Downsample,
    ModulatedNorm,
    ResBlock,
    Upsample,
    add_scaled,
)

_NONE, _LAST_TWO = (False,) * 5, (False, False, False, True, True)
_SR256_400M: dict[str, Any] = {
    "multipliers": (1, 2, 4, 6, 6),
    "blocks": (2, 2, 3, 4, 3),
    "self_attention": _LAST_TWO,
    "cross_attention": _LAST_TWO,
}
_SR256_600M: dict[str, Any] = {
    "multipliers": (1, 2, 4, 8, 8),
    "blocks": (2, 4, 8, 8, 8),
    "self_attention": _LAST_TWO,
    "cross_attention": _LAST_TWO,
    "strides": (2, 2, 2, 2, 1),
    "efficient": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "base64-2b": {"channels": 512},
    "base64-500m": {"channels": 256},
    "sr256-400m": _SR256_400M,
    "sr256-600m": _SR256_600M,
    "sr1024-600m": _SR256_600M | {"self_attention": _NONE},
}
"""Attributes of published networks, those of NVIDIA's Imagen recipes (NeMo), by names that say the resolution
and about how many parameters they have. The networks named efficient in the Imagen paper have four levels: 1,
2, 4, 8 with 2, 4, 8, 8 blocks and attention in the last."""


class Block(nn.Module):
    """A residual block, with attention behind it if `heads` is not zero.

    Attributes:
      features: width of the output.
      heads: of the attention.
      self_attention: see `AttentionBlock`.
      cross_attention: see `AttentionBlock`.
      dropout: rate inside the residual block.
      dtype: compute dtype.
    """

    features: int
    heads: int = 0
    self_attention: bool = False
    cross_attention: bool = False
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        vector: jax.Array,
        tokens: jax.Array,
        mask: jax.Array,
        skip: jax.Array | None = None,
    ) -> jax.Array:
        """Transform `h` `[b, h, w, any]`, to whose channels those of `skip` are appended, if there is one."""
        h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
        h = ResBlock(self.features, self.dropout, dtype=self.dtype, name="res")(h, vector)
        if self.heads:
            over = (self.self_attention, self.cross_attention)
            h = AttentionBlock(self.heads, *over, self.dtype, name="attention")(h, tokens, mask)
        return h


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
      time_input: what number the network is told; see `diffjax.nn.embeddings.to_thousand`.
      out_channels: channels of the prediction.
      dtype: compute dtype; norms and the last convolution are always float32.
      scan: whether the loops over equal blocks are rolled; see `diffjax.nn.repeat`.
      remat: what the backward pass recomputes; see `diffjax.nn.repeat.REMAT`.
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
    time_input: str = "logsnr"
    out_channels: int = 3
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = ""

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, channels]`.
          level: their noise level, `[batch]`; see `time_input`.
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
        tokens, mask, vector = self._condition(level, cond)
        shared = vector, tokens, mask
        dropout = 0.0 if deterministic else self.dropout
        loop = {"scan": self.scan, "remat": self.remat}

        def block(features: int, name: str, *, attends: int | None = None) -> Block:
            """A block that attends as the level `attends` says."""
            over = (False, False) if attends is None else self._attends(attends)
            heads = self._heads(features, attends) if any(over) else 0
            return Block(features, heads, *over, dropout=dropout, dtype=self.dtype, name=name)

        def attend(h: jax.Array, i: int, name: str) -> jax.Array:
            """The one attention of a level of the efficient network."""
            if not any(self._attends(i)):
                return h
            attention = AttentionBlock(self._heads(h.shape[-1], i), *self._attends(i), self.dtype, name=name)
            return once(attention, h, tokens, mask, remat=self.remat)

        if cond.low_res is not None:
            x = jnp.concatenate([x, cond.low_res.astype(x.dtype)], axis=-1)
        h = conv(widths[0], dtype=self.dtype, name="in")(x)
        h = entry = constrain(h, *FEATURE_MAP)

        skips: list[list[jax.Array]] = []  # for each level, the feature maps that its way up will need
        for i in levels:
            if strides[i] > 1:
                width = widths[i] if self.efficient else h.shape[-1]
                h = Downsample(width, strides[i], dtype=self.dtype, name=f"down_{i}")(h)
            make = partial(block, widths[i], attends=None if self.efficient else i)
            skips.append([h, *descend(make, self.blocks[i], h, *shared, name=f"down_{i}", **loop)])
            h = skips[i][-1]
            if self.efficient:
                h = attend(h, i, f"down_{i}_attention")
                skips[i] = [h]

        if not self.efficient:
            h = once(block(widths[-1], "middle_0", attends=levels[-1]), h, *shared, remat=self.remat)
            h = once(block(widths[-1], "middle_1"), h, *shared, remat=self.remat)

        for i in reversed(levels):
            if self.efficient:
                if i != levels[-1]:  # the last level's skip is `h` itself
                    h = add_scaled(h, skips[i].pop())
                make = partial(block, widths[max(i - 1, 0)])
                h = descend(make, self.blocks[i], h, *shared, name=f"up_{i}", **loop)[-1]
                h = attend(h, i, f"up_{i}_attention")
            else:
                h = ascend(partial(block, widths[i], attends=i), skips[i], h, *shared, name=f"up_{i}", **loop)
            if strides[i] > 1:
                h = Upsample(h.shape[-1], strides[i], self.dtype, name=f"up_{i}")(h)

        if strides[0] > 1:
            h = add_scaled(h, entry)
        # Modulated, because in the efficient network only this layer can weigh the noisy image, which the
        # entry brings here at full resolution, by its noise level.
        h = nn.silu(ModulatedNorm(dtype=self.dtype, name="norm_out")(h, vector))
        h = conv(self.out_channels, kernel_init=zeros, dtype=jnp.float32, name="out")(h)
        return constrain(h, *FEATURE_MAP)

    def _condition(self, level: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Text tokens `[b, 1 + length, embed]`, their mask, and the conditioning vector `[b, embed]`."""
        embed = 4 * self.channels
        embedding = partial(NoiseLevelEmbedding, embed, time_input=self.time_input, dtype=self.dtype)
        tokens, mask, vector = TextProjection(embed, dtype=self.dtype, name="text")(cond)
        vector = vector + embedding(name="noise_level")(level)
        if cond.aug_level is not None:
            vector = vector + embedding(name="aug_level")(cond.aug_level)
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

    def _attends(self, level: int) -> tuple[bool, bool]:
        """Whether a level attends to itself, and to the text."""
        return self.self_attention[level], self.cross_attention[level]

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
