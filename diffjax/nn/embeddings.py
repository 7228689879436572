"""Embeddings of noise levels and positions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.layers import Dtype, dense


def sinusoidal(values: jax.Array, features: int, *, max_period: float = 10_000.0) -> jax.Array:
    """Sines and cosines of `values` at geometrically spaced frequencies (Vaswani et al., 2017).

    Args:
      values: `[batch]`, on the scale of 0 to 1000 that DDPM's time indices have.
      features: size of the embedding; even.
      max_period: the longest wavelength over 2 pi.

    Returns:
      `[batch, features]`, float32, cosines first.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class NoiseLevelEmbedding(nn.Module):
    """Embeds a noise level, given as log-SNR, with sinusoids and a two-layer MLP.

    The log-SNR in [-20, 20] is mapped linearly to [0, 1000], so a network never depends on the schedule's
    own parametrisation of time and schedules can be exchanged.
    """

    features: int
    sinusoids: int = 256
    dtype: Dtype = None

    @nn.compact
    def __call__(self, logsnr: jax.Array) -> jax.Array:
        """`logsnr [batch] -> [batch, features]`."""
        x = sinusoidal((logsnr + 20.0) * 25.0, self.sinusoids)
        x = dense(self.features, dtype=self.dtype, name="in")(x)
        return dense(self.features, axes=("mlp", "embed"), dtype=self.dtype, name="out")(nn.silu(x))


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
