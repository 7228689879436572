"""Building blocks of the U-Nets: residual blocks, attention over feature maps, changes of resolution.

Feature maps are `[batch, height, width, channels]` throughout. Norms and the modulation between them run in
float32, convolutions and dense layers in `dtype`. Every residual branch begins as zero, so a new block is the
identity (or its skip); tests must therefore randomise the parameters.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention
from diffjax.nn.layers import Dtype, GroupNorm, Initializer, conv, dense, group_norm, layer_norm, lecun, zeros
from diffjax.nn.mlp import ACTIVATIONS
from diffjax.nn.placement import constrain

FEATURE_MAP = ("batch", "height", "width", "channels")
HIDDEN_MAP = ("batch", "height", "width", "conv_hidden")


def fitting_norm(features: int, *, name: str | None = None) -> GroupNorm:
    """A float32 group norm of `[..., features]`.

    It takes the largest number of groups up to 32 that divides `features` and leaves four channels to each:
    with fewer, the norm of a narrow network erases the mean of every single channel (EDM guards likewise).
    """
    most = min(32, max(1, features // 4))
    groups = next(groups for groups in range(most, 0, -1) if features % groups == 0)
    return group_norm(groups, name=name)


def norm_of(x: jax.Array, groups: int, epsilon: float, *, name: str) -> jax.Array:
    """The group norm of `x`, with `groups` or, if that is 0, with as many as fit."""
    return (
        group_norm(groups, epsilon=epsilon, name=name) if groups else fitting_norm(x.shape[-1], name=name)
    )(x)


def halved(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels: `[b, h, w, c] -> [b, h / 2, w / 2, c]`."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def doubled(x: jax.Array) -> jax.Array:
    """Every pixel four times: `[b, h, w, c] -> [b, 2 h, 2 w, c]`."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


RESAMPLE: dict[str, Callable[[jax.Array], jax.Array]] = {"": lambda x: x, "down": halved, "up": doubled}


def add_scaled(x: jax.Array, skip: jax.Array) -> jax.Array:
    """`(x + skip) / sqrt(2)`: the sum of two independent maps keeps their variance (SR3; Imagen)."""
    return (x + skip) * math.sqrt(0.5)


class ModulatedNorm(nn.Module):
    """A group norm whose output is scaled and shifted by a conditioning vector; float32.

    Attributes:
      groups: of the norm; 0: see `fitting_norm`.
      epsilon: of the norm.
      activation: of the vector.
      dtype: compute dtype of the dense layer that makes scale and shift.
    """

    groups: int = 0
    epsilon: float = 1e-6
    activation: str = "silu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, vector: jax.Array) -> jax.Array:
        """`x` `[batch, height, width, channels]`, `vector` `[batch, embed]`."""
        act = ACTIVATIONS[self.activation]
        layer = dense(2 * x.shape[-1], axes=("embed", "mlp"), dtype=self.dtype, name="modulation")
        # Tensor parallelism divides the layer, but not its few results: devices have parts of the halves, and
        # each half is whole on all of them, as to join gradients that are divided would take an all-to-all.
        modulation = constrain(layer(act(vector)), "batch", "embed").astype(jnp.float32)
        parts = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        scale, shift = (constrain(part, "batch", None, None, None) for part in parts)
        return norm_of(x, self.groups, self.epsilon, name="norm") * (1.0 + scale) + shift


class ResBlock(nn.Module):
    """A residual block that a conditioning vector may modulate (ADM: Dhariwal & Nichol, 2021).

    Group norm, activation, convolution; group norm, scale and shift by the vector, activation, dropout,
    convolution.

    Attributes:
      features: width of the output; a 1x1 convolution adapts the skip where the input's differs.
      dropout: rate; above zero the block draws from the `dropout` rng, so pass zero when not training.
      modulation: "scale_shift": the vector scales and shifts the second norm's output; "add": it is added to
        the first convolution's (DDPM, Stable Diffusion); "" there is no vector (autoencoders).
      resample: "down" halves the resolution by means of 2x2 pixels, "up" doubles it by repeating pixels,
        before the first convolution and in the skip (ADM).
      activation: one of `diffjax.nn.mlp.ACTIVATIONS`.
      groups: of the norms; 0: see `fitting_norm`.
      epsilon: of the norms.
      out_init: initializer of the second convolution.
      dtype: compute dtype.
      vector_activation: of the vector; None: `activation`.
      divisor: of the sum of skip and branch.
    """

    features: int
    dropout: float = 0.0
    modulation: str = "scale_shift"
    resample: str = ""
    activation: str = "silu"
    groups: int = 0
    epsilon: float = 1e-6
    out_init: Initializer = zeros
    dtype: Dtype = jnp.float32
    vector_activation: str | None = None
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, vector: jax.Array | None = None) -> jax.Array:
        """Transform a feature map.

        Args:
          x: `[batch, height, width, any]`.
          vector: the conditioning vector, `[batch, embed]`; None if there is no modulation.

        Returns:
          `[batch, height, width, features]` in `dtype`, or of half or twice the resolution.
        """
        act, resample = ACTIVATIONS[self.activation], RESAMPLE[self.resample]
        vector_activation = self.activation if self.vector_activation is None else self.vector_activation
        h = resample(act(norm_of(x, self.groups, self.epsilon, name="norm_in")))
        h = conv(self.features, axes=("conv_in", "conv_hidden"), dtype=self.dtype, name="conv_in")(h)
        if self.modulation == "add":
            added = dense(self.features, dtype=self.dtype, name="modulation")(
                ACTIVATIONS[vector_activation](vector)
            )
            h = h + added[:, None, None, :]
        if self.modulation == "scale_shift":
            norm = ModulatedNorm(self.groups, self.epsilon, vector_activation, self.dtype, name="norm_out")
            h = act(norm(h, vector))
        else:
            h = act(norm_of(h, self.groups, self.epsilon, name="norm_out"))
        if self.dropout:
            h = nn.Dropout(self.dropout, deterministic=False)(h)
        h = constrain(h, *HIDDEN_MAP)
        axes = ("conv_hidden", "conv_out")
        h = conv(self.features, axes=axes, kernel_init=self.out_init, dtype=self.dtype, name="conv_out")(h)

        x = resample(x.astype(self.dtype))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        y = x + h if self.divisor == 1.0 else (x + h) / self.divisor
        return constrain(y, *FEATURE_MAP)


class AttentionBlock(nn.Module):
    """Attention of every place of a feature map to every other place, to text tokens, or to both in turn.

    Each attention is pre-normed and residual. There is no feed-forward layer: the residual blocks around it
    are one.

    Attributes:
      heads: number of heads; the width of the feature map must be divisible by it.
      self_attention: attend to the map itself.
      cross_attention: attend to the text tokens, after self-attention.
      dtype: compute dtype.
      groups: of a group norm before self-attention; 0: a layer norm.
    """

    heads: int
    self_attention: bool = True
    cross_attention: bool = False
    dtype: Dtype = jnp.float32
    groups: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attend.

        Args:
          x: `[batch, height, width, channels]`.
          tokens: `[batch, length, embed]`, needed for cross-attention only.
          mask: `[batch, length]` bool, False at tokens that must not be seen.

        Returns:
          `[batch, height, width, channels]` in `dtype`.
        """
        h = x.astype(self.dtype).reshape(x.shape[0], -1, x.shape[-1])  # [batch, height * width, channels]
        if self.self_attention:
            norm = group_norm(self.groups, name="self_norm") if self.groups else layer_norm(name="self_norm")
            normed = norm(h.astype(jnp.float32))
            h = h + Attention(self.heads, dtype=self.dtype, out_init=zeros, name="self_attention")(normed)
        if self.cross_attention:
            normed = layer_norm(dtype=jnp.float32, name="cross_norm")(h)
            attention = Attention(self.heads, dtype=self.dtype, out_init=zeros, name="cross_attention")
            h = h + attention(normed, tokens, mask)
        return constrain(h.reshape(x.shape), *FEATURE_MAP)


class Downsample(nn.Module):
    """Divides the resolution by `stride` with one strided 3x3 convolution, which may change the width.

    Attributes:
      features: width of the output.
      stride: what divides the resolution.
      padding: "SAME" pads an even image on its lower and right side only; ((0, 1), (0, 1)) does so with any
        (autoencoders of Stable Diffusion); 1 on all sides (its U-Nets).
      dtype: compute dtype.
    """

    features: int
    stride: int = 2
    padding: str | int | tuple[tuple[int, int], ...] = "SAME"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, any] -> [b, h / stride, w / stride, features]`."""
        x = conv(self.features, stride=self.stride, padding=self.padding, dtype=self.dtype, name="conv")(x)
        return constrain(x, *FEATURE_MAP)


class NearestUpsample(nn.Module):
    """Doubles the resolution by repeating pixels, and smooths with a 3x3 convolution."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, any] -> [b, 2 h, 2 w, features]`."""
        return constrain(conv(self.features, dtype=self.dtype, name="conv")(doubled(x)), *FEATURE_MAP)


class Upsample(nn.Module):
    """Multiplies the resolution by `stride` with a 1x1 convolution and depth-to-space (Shi et al. 2016).

    A 3x3 convolution after nearest-neighbour upsampling would cost nine times as much and, in the Efficient
    U-Net, work at the full resolution that the network is built to avoid. What speaks against sub-pixel
    convolutions are checkerboards: as in ICNR (Aitken et al. 2017, arXiv:1707.02937) the places of one patch
    begin with equal kernels, so the layer begins as nearest-neighbour upsampling.
    """

    features: int
    stride: int = 2
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, any] -> [b, h * stride, w * stride, features]`."""
        places = self.stride**2

        def nearest(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
            return jnp.tile(lecun(key, (*shape[:-1], shape[-1] // places), dtype), places)

        x = conv(self.features * places, 1, kernel_init=nearest, dtype=self.dtype, name="conv")(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, self.stride, self.stride, self.features)
        x = x.swapaxes(2, 3)  # [b, h, stride, w, stride, features]
        x = x.reshape(batch, height * self.stride, width * self.stride, self.features)
        return constrain(x, *FEATURE_MAP)
