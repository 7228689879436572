"""Layers that keep the expected magnitude of their inputs (Karras et al. 2024, arXiv:2312.02696: EDM2).

The magnitude of an array is its root mean square. Weight vectors enter as unit vectors, whatever is stored,
so a layer keeps the magnitude of inputs that are not correlated with them; the other operations have factors
that undo what they do to the magnitude of independent inputs. Nothing has a bias.

The gradient of such a weight vector is orthogonal to it, hence every update makes the stored vector longer
and the next ones relatively smaller. Training therefore calls `normalised` on the parameters after each
update, which the paper calls forced weight normalisation.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.layers import Dtype, convolve, param

WEIGHT = "direction"
"""The name of every parameter of which the direction alone matters."""
EPSILON = 1e-4


def pixel_norm(x: jax.Array, axis: int | Sequence[int] = -1) -> jax.Array:
    """`x` over its root mean square along `axis`, taken in float32."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True)
    norm = jnp.sqrt(square + 1e-30)  # the root has no derivative at zero
    return x / (EPSILON + norm).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """SiLU over the magnitude, 0.596, that it gives a standard normal."""
    return jax.nn.silu(x) / 0.596


def mix(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """The way from `a` to `b`, of which the part `t` is gone, at the magnitude of independent `a` and `b`."""
    return ((1.0 - t) * a + t * b) / math.hypot(1.0 - t, t)


def concatenate(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """`a` and `b` along the last axis, with the contribution of `b` to what follows weighted by `t`.

    However many channels the two have, a layer behind sees their magnitudes as 1 - t to t.
    """
    channels = a.shape[-1], b.shape[-1]
    whole = math.sqrt(sum(channels)) / math.hypot(1.0 - t, t)
    weights = whole * (1.0 - t) / math.sqrt(channels[0]), whole * t / math.sqrt(channels[1])
    return jnp.concatenate([weights[0] * a, weights[1] * b], axis=-1)


def fourier(level: jax.Array, features: int) -> jax.Array:
    """Random Fourier features of magnitude one, `[batch] -> [batch, features]`, float32.

    The frequencies are normal and the phases uniform. Neither is trained, so instead of drawing and storing
    them we take the quantiles of the one and a sequence of the golden ratio for the other.
    """
    normal = NormalDist()
    frequencies = np.array([normal.inv_cdf((i + 0.5) / features) for i in range(features)])
    phases = (np.arange(features) * (math.sqrt(5.0) - 1.0) / 2.0) % 1.0
    angles = level.astype(jnp.float32)[:, None] * (2.0 * np.pi * frequencies) + 2.0 * np.pi * phases
    return math.sqrt(2.0) * jnp.cos(angles.astype(jnp.float32))


class MagnitudeDense(nn.Module):
    """A linear layer `[..., in] -> [..., features]` whose columns are unit vectors.

    Attributes:
      features: width of the output.
      axes: logical names of the weight's axes.
      dtype: compute dtype.
    """

    features: int
    axes: tuple[str, str] = ("embed", "features")
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform."""
        shape = (x.shape[-1], self.features)
        weight = param(self, WEIGHT, nn.initializers.normal(1.0), shape, self.axes)
        return x.astype(self.dtype) @ _unit(weight).astype(self.dtype)


class MagnitudeConv(nn.Module):
    """A square convolution `[b, h, w, in] -> [b, h, w, features]` whose kernels are unit vectors."""

    features: int
    kernel_size: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        axes = ("window", "window", "conv_in", "conv_out")
        weight = param(self, WEIGHT, nn.initializers.normal(1.0), shape, axes)
        return convolve(
            x.astype(self.dtype),
            _unit(weight).astype(self.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def normalised(params: Any) -> Any:
    """The parameters, with every weight vector scaled to magnitude one; to be called after each update.

    Args:
      params: any tree; parameters of other layers come back as they are.
    """

    def normalise(path: Any, leaf: jax.Array) -> jax.Array:
        if not path or getattr(path[-1], "key", None) != WEIGHT:
            return leaf
        return pixel_norm(leaf, _inputs(leaf.ndim))

    return jax.tree_util.tree_map_with_path(normalise, params)


def _unit(weight: jax.Array) -> jax.Array:
    """`weight` with unit vectors for each output."""
    return pixel_norm(weight, _inputs(weight.ndim)) / math.sqrt(weight.size // weight.shape[-1])


def _inputs(ndim: int) -> tuple[int, ...]:
    """The axes that are summed over of a weight `[in, out]` or `[h, w, in, out]`, or of a stack of them."""
    return (-2,) if ndim < 4 else (-4, -3, -2)
