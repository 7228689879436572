"""Embeddings of noise levels and positions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.layers import Dtype, Initializer, embedding, lecun
from diffjax.nn.mlp import Mlp


def sinusoidal(
    values: jax.Array,
    features: int,
    *,
    max_period: float = 10_000.0,
    sine_first: bool = False,
    shift: float = 0.0,
) -> jax.Array:
    """Sines and cosines of `values` at geometrically spaced frequencies (Vaswani et al., 2017).

    Args:
      values: `[batch]`, on the scale of 0 to 1000 that DDPM's time indices have.
      features: size of the embedding; even.
      max_period: the longest wavelength over 2 pi, if `shift` is 1; else it is not quite reached.
      sine_first: whether the sines stand in the first half.
      shift: subtracted from the number of frequencies in their exponent; 0 or 1.

    Returns:
      `[batch, features]`, float32, cosines first.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts[::-1] if sine_first else parts, axis=-1)


def to_thousand(level: jax.Array, time_input: str) -> jax.Array:
    """A noise level on the scale of 0 to 1000, on which sinusoids tell levels apart.

    A log-SNR in [-20, 20] is mapped linearly, so that a network which is told it never depends on the
    schedule's own parametrisation of time and schedules can be exchanged. EDM's `ln(sigma) / 4` is an eighth
    of the negative log-SNR.

    Args:
      level: `[batch]`.
      time_input: what it is: "logsnr", "edm", or, already on this scale, "timestep" or "time".
    """
    if time_input == "edm":
        level = -8.0 * level
    if time_input in ("logsnr", "edm"):
        return (level + 20.0) * 25.0
    if time_input not in ("timestep", "time"):
        raise ValueError(f"time_input is {time_input!r}; expected logsnr, edm, timestep or time")
    return level


class NoiseLevelEmbedding(nn.Module):
    """Embeds a noise level with sinusoids and a two-layer MLP.

    Attributes:
      features: width of the embedding, and of the MLP.
      sinusoids: number of sines and cosines.
      time_input: what number the network is told; see `to_thousand`.
      activation: between the layers.
      kernel_init: initializer of the layers.
      dtype: compute dtype.
    """

    features: int
    sinusoids: int = 256
    time_input: str = "logsnr"
    activation: str = "silu"
    kernel_init: Initializer = lecun
    dtype: Dtype = None

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        """`level [batch] -> [batch, features]`."""
        x = sinusoidal(to_thousand(level, self.time_input), self.sinusoids)
        return Mlp(
            self.features,
            self.activation,
            features=self.features,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="mlp",
        )(x)


class LabelEmbedding(nn.Module):
    """A vector for each class, and one more, the last, for none (a negative label)."""

    classes: int
    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        """`[batch] int32 -> [batch, features]`."""
        rows = jnp.where(label < 0, self.classes, label)
        return embedding(self.classes + 1, self.features, dtype=self.dtype, name="table")(rows)


def sincos_positions_2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine positions (MAE; DiT): `[height * width, features]`, float32.

    The first half of the features encodes the row, the second the column; `features` must be divisible by 4.
    """
    frequencies = 1.0 / 10_000.0 ** (np.arange(features // 4, dtype=np.float64) / (features // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    encoded = [encode(rows.reshape(-1)), encode(columns.reshape(-1))]
    return np.concatenate(encoded, axis=1).astype(np.float32)
