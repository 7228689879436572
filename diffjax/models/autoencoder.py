"""The autoencoder of latent diffusion: images to a Gaussian over latents, and latents to images.

Rombach et al. 2022, arXiv:2112.10752, as the public checkpoints have it: residual blocks without a
conditioning vector, one head of attention in the middle, four latent channels (Stable Diffusion, SDXL) or
sixteen (SD3, FLUX). `Autoencoder` speaks of z, latents as the network knows them, and of latents as a
diffusion model sees them: shifted and scaled to about unit variance. `to_latents` and `from_latents` go
between the two.

What an image too large for the memory needs, `tiled_encode` and `tiled_decode`, are functions outside.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.layers import Dtype, conv, group_norm
from diffjax.nn.levels import descend
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import once
from diffjax.nn.resblock import FEATURE_MAP, AttentionBlock, Downsample, NearestUpsample, ResBlock

OVERLAP = 0.25
"""Of a tile's side, what it shares with each neighbour."""


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents.

    Attributes:
      mean: `[batch, height, width, channels]`.
      logvar: the logarithm of its variance, in [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> jax.Array:
        """The divergence from the standard normal, summed over each example: `[batch]`."""
        terms = self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))


def gaussian(moments: jax.Array) -> Gaussian:
    """Split `[batch, height, width, 2 channels]` into mean and logarithm of the variance."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))


class Trunk(nn.Module):
    """What encoder and decoder share; their attributes are those of `Autoencoder`."""

    features: int
    channels: tuple[int, ...]
    blocks: int
    groups: int
    attention: bool
    project: bool
    dtype: Dtype
    scan: bool
    remat: str

    def _res_block(self, width: int, name: str) -> ResBlock:
        return ResBlock(width, modulation="", groups=self.groups, dtype=self.dtype, name=name)

    def _level(self, h: jax.Array, width: int, count: int, name: str) -> jax.Array:
        make = partial(self._res_block, width)
        return descend(make, count, h, name=name, scan=self.scan, remat=self.remat)[-1]

    def _middle(self, h: jax.Array) -> jax.Array:
        width = self.channels[-1]
        h = once(self._res_block(width, "middle_0"), h, remat=self.remat)
        if self.attention:
            attention = AttentionBlock(1, dtype=self.dtype, groups=self.groups, name="middle_attention")
            h = once(attention, h, remat=self.remat)
        return once(self._res_block(width, "middle_1"), h, remat=self.remat)

    def _out(self, h: jax.Array) -> jax.Array:
        h = nn.silu(group_norm(self.groups, name="norm_out")(h))
        return constrain(conv(self.features, dtype=jnp.float32, name="out")(h), *FEATURE_MAP)


class Encoder(Trunk):
    """Images to the moments of a Gaussian, `[b, h, w, any] -> [b, h / f, w / f, features]`, float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` in [-1, 1]."""
        h = constrain(conv(self.channels[0], dtype=self.dtype, name="in")(x), *FEATURE_MAP)
        for level, width in enumerate(self.channels):
            h = self._level(h, width, self.blocks, f"down_{level}")
            if level < len(self.channels) - 1:
                below_and_right = ((0, 1), (0, 1))
                h = Downsample(width, padding=below_and_right, dtype=self.dtype, name=f"down_{level}")(h)
        h = self._out(self._middle(h))
        return conv(self.features, 1, name="moments")(h) if self.project else h


class Decoder(Trunk):
    """Latents to images, `[b, h, w, any] -> [b, f h, f w, features]`, float32."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """`z` as the encoder's Gaussian has it."""
        h = conv(z.shape[-1], 1, name="latents")(z) if self.project else z
        h = constrain(conv(self.channels[-1], dtype=self.dtype, name="in")(h), *FEATURE_MAP)
        h = self._middle(h)
        for level in reversed(range(len(self.channels))):
            h = self._level(h, self.channels[level], self.blocks + 1, f"up_{level}")
            if level > 0:
                h = NearestUpsample(self.channels[level], dtype=self.dtype, name=f"up_{level}")(h)
        return self._out(h)


class Autoencoder(nn.Module):
    """An encoder and a decoder; each works with its own part of the parameters, `encoder` and `decoder`.

    `net.apply({"params": {"decoder": params}}, z, method="decode")` is what sampling needs.

    Attributes:
      latent_channels: of the latents.
      channels: width of each level, highest resolution first; each but the last halves the resolution.
      blocks: residual blocks of each level of the encoder; the decoder has one more.
      groups: of the norms.
      attention: whether the middle attends.
      project_moments: a last 1x1 convolution of the encoder's.
      project_latents: a first 1x1 convolution of the decoder's.
      scaling_factor: what latents are multiplied with, after the shift.
      shift_factor: what is subtracted from them.
      latents_mean: the same for each channel, instead of `shift_factor`; empty for none.
      latents_std: what each channel is divided by besides; empty for none.
      sample_size: side of the images that it was trained on, and of a tile.
      out_channels: channels of the images.
      dtype: compute dtype; norms, and the last convolutions, are always float32.
      scan: whether the loops over equal blocks are rolled; see `diffjax.nn.repeat`.
      remat: what the backward pass recomputes; see `diffjax.nn.repeat.REMAT`.
    """

    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    attention: bool = True
    project_moments: bool = True
    project_latents: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    sample_size: int = 512
    out_channels: int = 3
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = ""

    def setup(self) -> None:
        """Make the two halves."""
        names = ("channels", "blocks", "groups", "attention", "dtype", "scan", "remat")
        trunk = {name: getattr(self, name) for name in names}
        self.encoder = Encoder(2 * self.latent_channels, project=self.project_moments, **trunk)
        self.decoder = Decoder(self.out_channels, project=self.project_latents, **trunk)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Gaussian]:
        """Encode and decode.

        Args:
          x: images in [-1, 1], `[batch, height, width, out_channels]`.
          key: to draw the latents with; None: their mean is decoded.

        Returns:
          the reconstruction, and the Gaussian of the latents.
        """
        posterior = self.encode(x)
        return self.decode(posterior.mean if key is None else posterior.sample(key)), posterior

    def encode(self, x: jax.Array) -> Gaussian:
        """Images in [-1, 1] to the Gaussian of their z."""
        return gaussian(self.moments(x))

    def decode(self, z: jax.Array) -> jax.Array:
        """z to images, about in [-1, 1]."""
        return self.decoder(z)

    def moments(self, x: jax.Array) -> jax.Array:
        """What `encode` makes its Gaussian of: `[batch, height, width, 2 latent_channels]`."""
        return self.encoder(x)

    @nn.nowrap
    def to_latents(self, z: jax.Array) -> jax.Array:
        """z, shifted and scaled to what a diffusion model sees; needs no parameters."""
        shift, scale = self._shift_and_scale()
        return (z - shift) * scale

    @nn.nowrap
    def from_latents(self, latents: jax.Array) -> jax.Array:
        """The inverse of `to_latents`."""
        shift, scale = self._shift_and_scale()
        return latents / scale + shift

    @nn.nowrap
    def stride(self) -> int:
        """By what the encoder divides the resolution."""
        return 2 ** (len(self.channels) - 1)

    @nn.nowrap
    def _shift_and_scale(self) -> tuple[jax.Array, jax.Array]:
        shift = jnp.asarray(self.latents_mean or self.shift_factor, jnp.float32)
        std = jnp.asarray(self.latents_std or 1.0, jnp.float32)
        return shift, self.scaling_factor / std


def tiled_encode(net: Autoencoder, params: Any, images: jax.Array, *, tile: int | None = None) -> Gaussian:
    """Encode images of any size in the memory that a tile needs.

    Args:
      net: the autoencoder.
      params: its parameters, those of the encoder at least.
      images: `[batch, height, width, channels]`.
      tile: side of a tile in pixels; None: `net.sample_size`.
    """
    pixels = tile or net.sample_size

    def encode(tile: jax.Array) -> Any:
        return net.apply({"params": params}, tile, method="moments")

    return gaussian(_tiled(encode, images, pixels, pixels // net.stride()))


def tiled_decode(net: Autoencoder, params: Any, z: jax.Array, *, tile: int | None = None) -> jax.Array:
    """Decode latents of any size in the memory that a tile needs; the inverse of `tiled_encode`."""
    pixels = tile or net.sample_size

    def decode(tile: jax.Array) -> Any:
        return net.apply({"params": params}, tile, method="decode")

    return _tiled(decode, z, pixels // net.stride(), pixels)


def _tiled(apply: Callable[[jax.Array], jax.Array], x: jax.Array, side: int, out_side: int) -> jax.Array:
    """Apply a network to overlapping tiles, and blend what comes out linearly where they overlap.

    Tiles of one shape pass through one loop, so the network is compiled once for those inside and once for
    each shape at the lower and right borders, where they are smaller.

    Args:
      apply: the network.
      x: `[batch, height, width, any]`.
      side: of a tile there.
      out_side: of the output of a whole tile.
    """
    step, overlap = int(side * (1 - OVERLAP)), int(out_side * OVERLAP)
    if step < 1 or out_side < 1:
        raise ValueError(f"a tile of {side} that becomes one of {out_side} is too small to overlap others")
    tops, lefts = range(0, x.shape[1], step), range(0, x.shape[2], step)
    shapes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    tiles = {}
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            tiles[row, column] = x[:, top : top + side, left : left + side]
            shapes.setdefault(tiles[row, column].shape, []).append((row, column))
    for places in shapes.values():
        out = jax.lax.map(apply, jnp.stack([tiles[place] for place in places]))
        tiles |= dict(zip(places, out, strict=True))

    for (row, column), tile in tiles.items():  # row by row: those above and to the left are blended already
        if row:
            tile = _blend(tiles[row - 1, column], tile, overlap, axis=1)
        if column:
            tile = _blend(tiles[row, column - 1], tile, overlap, axis=2)
        tiles[row, column] = tile
    keep = out_side - overlap
    rows = [
        jnp.concatenate([tiles[row, column][:, :keep, :keep] for column in range(len(lefts))], axis=2)
        for row in range(len(tops))
    ]
    return jnp.concatenate(rows, axis=1)


def _blend(before: jax.Array, after: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`after`, whose beginning along `axis` fades in over the end of `before`."""
    overlap = min(overlap, before.shape[axis], after.shape[axis])
    weight = (jnp.arange(overlap) / max(overlap, 1)).reshape(-1, *(1,) * (after.ndim - 1 - axis))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, before.shape[axis], axis=axis)
    start = jax.lax.slice_in_dim(after, 0, overlap, axis=axis)
    rest = jax.lax.slice_in_dim(after, overlap, after.shape[axis], axis=axis)
    return jnp.concatenate([end * (1.0 - weight) + start * weight, rest], axis=axis)
