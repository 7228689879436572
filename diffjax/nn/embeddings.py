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
    # On the host, rounded as in PyTorch: at a value of 30 000 one bit of a frequency is 0.002 of an angle.
    exponents = -math.log(max_period) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.exp(exponents, dtype=np.float64).astype(np.float32)
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
      shift: of the sinusoids; see `sinusoidal`.
      activation: between the layers.
      sine_first: of the sinusoids.
      kernel_init: initializer of the layers.
      dtype: compute dtype.
    """

    features: int
    sinusoids: int = 256
    time_input: str = "logsnr"
    shift: float = 0.0
    activation: str = "silu"
    kernel_init: Initializer = lecun
    dtype: Dtype = None
    sine_first: bool = False

    @nn.compact
    def __call__(self, level: jax.Array, added: jax.Array | None = None) -> jax.Array:
        """`level [batch] -> [batch, features]`; `added [batch, sinusoids]` is added to the sinusoids."""
        level = to_thousand(level, self.time_input)
        x = sinusoidal(level, self.sinusoids, sine_first=self.sine_first, shift=self.shift)
        x = x if added is None else x + added
        return Mlp(
            self.features,
            self.activation,
            features=self.features,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="mlp",
        )(x)


class LabelEmbedding(nn.Module):
    """A vector for each class, and one more, the last, for none (a negative label): zeros without `null`."""

    classes: int
    features: int
    dtype: Dtype = None
    null: bool = True

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        """`[batch] int32 -> [batch, features]`."""
        table = embedding(self.classes + self.null, self.features, dtype=self.dtype, name="table")
        vectors = table(jnp.where(label < 0, self.classes if self.null else 0, label))
        return vectors if self.null else jnp.where(label[:, None] < 0, 0.0, vectors)


class LevelLabelEmbedding(nn.Module):
    """A noise level and, if there are `classes`, a class label to vectors.

    The attributes are those of `NoiseLevelEmbedding` and `LabelEmbedding`.
    """

    features: int
    classes: int = 0
    time_input: str = "timestep"
    shift: float = 0.0
    kernel_init: Initializer = lecun
    dtype: Dtype = None

    @nn.compact
    def __call__(self, level: jax.Array, label: jax.Array | None) -> list[jax.Array]:
        """`[batch]` and, as int32, `[batch]` to one or two of `[batch, features]`."""
        embed = NoiseLevelEmbedding(
            self.features,
            time_input=self.time_input,
            shift=self.shift,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="level",
        )
        if not self.classes:
            return [embed(level)]
        return [embed(level), LabelEmbedding(self.classes, self.features, self.dtype, name="label")(label)]


def sincos_positions_2d(
    height: int,
    width: int,
    features: int,
    *,
    step: float | tuple[float, float] = 1.0,
    column_first: bool = False,
) -> np.ndarray:
    """Fixed two-dimensional sine-cosine positions (MAE; DiT): `[height * width, features]`, float32.

    Args:
      height: number of rows.
      width: number of columns.
      features: of each position; divisible by 4.
      step: between neighbouring rows and columns; two numbers where they differ.
      column_first: the first half of the features encodes the column and the second the row, as in the
        published code of MAE, DiT and SD3; else the other way round.
    """
    frequencies = 1.0 / 10_000.0 ** (np.arange(features // 4, dtype=np.float64) / (features // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    row_step, column_step = step if isinstance(step, tuple) else (step, step)
    encoded = [encode(row_step * rows.reshape(-1)), encode(column_step * columns.reshape(-1))]
    return np.concatenate(encoded[::-1] if column_first else encoded, axis=1).astype(np.float32)
