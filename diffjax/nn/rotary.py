"""Rotary positions (Su et al., 2021) over any number of axes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotary(NamedTuple):
    """Angles of each token: cosines and sines, `[length or batch x length, head_dim / 2]`, float32.

    Pairs of neighbouring features (0 and 1, 2 and 3, …) are turned together.
    """

    cos: jax.Array
    sin: jax.Array


def rotary(positions: jax.Array, widths: tuple[int, ...], *, theta: float = 10_000.0) -> Rotary:
    """The angles of tokens with positions along several axes.

    Args:
      positions: `[…, length, axes]`.
      widths: how many features of a head each axis turns; even, and `head_dim` in sum.
      theta: the longest wavelength over 2 pi.
    """
    angles = []
    for axis, width in enumerate(widths):
        frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles.append(positions[..., axis, None].astype(jnp.float32) * frequencies)
    angle = jnp.concatenate(angles, axis=-1)
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, by: Rotary) -> jax.Array:
    """Turn queries or keys `[batch, length, heads, head_dim]`; computed in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = by.cos[..., :, None, :], by.sin[..., :, None, :]  # one for all heads
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
