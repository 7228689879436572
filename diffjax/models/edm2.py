"""EDM2: the class-conditional U-Net that keeps magnitudes (Karras et al. 2024, arXiv:2312.02696, config G).

An ADM U-Net (Dhariwal and Nichol, 2021) of the layers of `diffjax.nn.magnitude`: no biases, no group norms, a
constant channel in place of the biases, cosine attention, residual sums and concatenations at constant
magnitude. The input is preconditioned outside (scaled to unit variance), and so is the output. Training calls
`diffjax.nn.magnitude.normalised` on the parameters after each update.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, param, zeros
from diffjax.nn.levels import ascend, descend
from diffjax.nn.magnitude import (
    MagnitudeConv,
    MagnitudeDense,
    concatenate,
    fourier,
    mix,
    pixel_norm,
    silu,
)
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import once
from diffjax.nn.resblock import FEATURE_MAP, RESAMPLE

SIZES: dict[str, dict[str, Any]] = {
    "xs": {"channels": 128},
    "s": {"channels": 192},
    "m": {"channels": 256},
    "l": {"channels": 320},
    "xl": {"channels": 384},
    "xxl": {"channels": 448},
}
"""The published networks, of 125 M to 1523 M parameters: for the 64 x 64 latents of ImageNet-512 and, with an
`out_channels` of 3, for the pixels of ImageNet-64."""
RESIDUAL_BALANCE = 0.3
CLIP = 256.0  # keeps half precision from overflowing where a sum of many blocks grows


class MagnitudeBlock(nn.Module):
    """A residual block of config G, with cosine attention behind it if `head_dim` is not zero.

    Attributes:
      features: width of the output.
      encoder: the encoder's adapt the width and normalise the pixels of the skip before the residual branch;
        the decoder's branch begins at the block's input.
      resample: "down", "up" or "": what happens to the input first.
      head_dim: width of an attention head; 0: no attention.
      dropout: rate; draws from the `dropout` rng if not zero.
      dtype: compute dtype.
    """

    features: int
    encoder: bool = True
    resample: str = ""
    head_dim: int = 0
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, vector: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Transform.

        Args:
          x: `[batch, height, width, any]`.
          vector: what scales the channels, `[batch, embed]`.
          skip: a feature map to concatenate first, or None.

        Returns:
          `[batch, height, width, features]`, or of half or twice the resolution.
        """
        x = x if skip is None else concatenate(x, skip)
        x = RESAMPLE[self.resample](x)
        if self.encoder:
            x = pixel_norm(self._adapted(x))
        y = MagnitudeConv(self.features, dtype=self.dtype, name="conv_in")(silu(x))
        gain = param(self, "gain", zeros, (), ())
        scale = gain * MagnitudeDense(self.features, dtype=self.dtype, name="modulation")(vector) + 1.0
        y = silu(y * scale[:, None, None, :].astype(y.dtype))
        if self.dropout:
            y = nn.Dropout(self.dropout, deterministic=False)(y)
        y = MagnitudeConv(self.features, dtype=self.dtype, name="conv_out")(y)
        x = mix(x if self.encoder else self._adapted(x), y, RESIDUAL_BALANCE)
        if self.head_dim:
            x = mix(x, self._attention(x), RESIDUAL_BALANCE)
        return constrain(jnp.clip(x, -CLIP, CLIP), *FEATURE_MAP)

    def _adapted(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.features:
            return x
        return MagnitudeConv(self.features, 1, dtype=self.dtype, name="skip")(x)

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        if features % self.head_dim:
            raise ValueError(f"{features} channels do not divide into heads {self.head_dim} wide")
        tokens = x.reshape(batch, height * width, features)
        qkv = MagnitudeDense(3 * features, ("embed", "heads"), self.dtype, name="qkv")(tokens)
        heads = pixel_norm(qkv.reshape(batch, height * width, 3, features // self.head_dim, self.head_dim))
        y = attend(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]).reshape(tokens.shape)
        return MagnitudeDense(features, ("heads", "embed"), self.dtype, name="out")(y).reshape(x.shape)


class EDM2UNet(nn.Module):
    """The U-Net; see the module's docstring.

    Attributes:
      channels: width that the multipliers multiply.
      multipliers: width of each level over `channels`, highest resolution first; each next one halves it.
      blocks: residual blocks of each level on the way down; one more on the way up.
      attention: which levels attend, and the first of the two blocks in the middle always does.
      head_dim: width of an attention head.
      classes: number of classes; 0: `cond.label` is not looked at.
      dropout: rate inside the residual blocks.
      time_input: what number the network is told: "edm", ln(sigma) / 4, or "logsnr", minus eight times that.
      out_channels: channels of the prediction.
      dtype: compute dtype.
      scan: whether the loops over equal blocks are rolled; see `diffjax.nn.repeat`.
      remat: what the backward pass recomputes; see `diffjax.nn.repeat.REMAT`.
    """

    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[bool, ...] = (False, False, True, True)
    head_dim: int = 64
    classes: int = 1000
    dropout: float = 0.0
    time_input: str = "edm"
    out_channels: int = 4
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = ""

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images of unit variance, `[batch, height, width, any]`.
          level: their noise level, `[batch]`; see `time_input`.
          cond: the classes, `cond.label`; a negative one is none.
          deterministic: False in training; draws from the `dropout` rng if `dropout` is not zero.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        if len(self.attention) != len(self.multipliers):
            raise ValueError(f"attention is {self.attention}; expected one for each of {self.multipliers}")
        if any(side % 2 ** (len(self.multipliers) - 1) for side in x.shape[1:3]):
            raise ValueError(f"images of {x.shape[1:3]} cannot be halved {len(self.multipliers) - 1} times")
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        vector = self._vector(level, cond, widths)
        dropout = 0.0 if deterministic else self.dropout

        loop = {"scan": self.scan, "remat": self.remat}

        def block(features: int, name: str, *, attention: bool = False, **of: Any) -> MagnitudeBlock:
            return MagnitudeBlock(
                features,
                head_dim=self.head_dim if attention else 0,
                dropout=dropout,
                dtype=self.dtype,
                name=name,
                **of,
            )

        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # instead of biases
        h = constrain(MagnitudeConv(widths[0], dtype=self.dtype, name="in")(x), *FEATURE_MAP)
        skips: list[list[jax.Array]] = []
        for i, (width, attention) in enumerate(zip(widths, self.attention, strict=True)):
            if i:
                h = once(block(h.shape[-1], f"down_{i}", resample="down"), h, vector, remat=self.remat)
            make = partial(block, width, attention=attention)
            skips.append([h, *descend(make, self.blocks, h, vector, name=f"down_{i}", **loop)])
            h = skips[i][-1]

        make = partial(block, widths[-1], encoder=False)
        h = once(make("middle_0", attention=True), h, vector, remat=self.remat)
        h = once(make("middle_1"), h, vector, remat=self.remat)

        for i in reversed(range(len(widths))):
            make = partial(block, widths[i], encoder=False, attention=self.attention[i])
            h = ascend(make, skips[i], h, vector, name=f"up_{i}", **loop)
            if i:
                up = block(widths[i], f"up_{i}", encoder=False, resample="up")
                h = once(up, h, vector, remat=self.remat)

        gain = param(self, "gain", zeros, (), ())
        h = MagnitudeConv(self.out_channels, dtype=self.dtype, name="out")(h)
        return constrain(h.astype(jnp.float32) * gain, *FEATURE_MAP)

    def _vector(self, level: jax.Array, cond: Cond, widths: list[int]) -> jax.Array:
        """What the blocks are told of noise level and class, `[batch, embed]`."""
        if self.time_input not in ("edm", "logsnr"):
            raise ValueError(f"time_input is {self.time_input!r}; expected edm or logsnr")
        if self.time_input == "logsnr":
            level = level / -8.0
        embed = max(widths)
        vector = MagnitudeDense(embed, dtype=self.dtype, name="noise_level")(fourier(level, widths[0]))
        if self.classes:
            if cond.label is None:
                raise ValueError("this network is conditioned on classes: cond.label")
            # A one-hot vector of magnitude one; a negative label's is zero.
            one_hot = jax.nn.one_hot(cond.label, self.classes) * math.sqrt(self.classes)
            vector = mix(vector, MagnitudeDense(embed, dtype=self.dtype, name="label")(one_hot), 0.5)
        return silu(vector)
