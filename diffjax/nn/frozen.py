"""Layers of convolutional networks that are only ever applied, with the semantics of PyTorch's."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.layers import lecun, ones, param, zeros

max_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
"""The largest of each 3x3 window, at every second row and column, of whole windows only."""


def average_around(x: jax.Array) -> jax.Array:
    """The mean of the 3x3 neighbours that there are, at every place: `[b, h, w, c] -> [b, h, w, c]`."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


class BatchNorm(nn.Module):
    """A batch norm whose statistics are parameters, since nothing changes them any more.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c] -> [b, h, w, c]`."""
        starts = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        own = {k: param(self, k, init, x.shape[-1:], ("conv_out",)) for k, init in starts.items()}
        return (x - own["mean"]) * (own["scale"] * jax.lax.rsqrt(own["var"] + self.epsilon)) + own["bias"]


class Depthwise(nn.Module):
    """A convolution of each channel on its own, padded as TensorFlow's "SAME" does it, without bias.

    It is a sum of shifted pictures: XLA's own (of jax 0.10) takes 5 to 16 times as long on CPUs.

    Attributes:
      window: side of the kernel.
      stride: of rows and columns.
    """

    window: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c] -> [b, h/stride, w/stride, c]`."""
        shape = (self.window, self.window, 1, x.shape[-1])
        kernel = param(self, "kernel", lecun, shape, ("window", "window", None, "conv_out"))
        rows, columns = (-(-side // self.stride) for side in x.shape[1:3])
        padding = jax.lax.padtype_to_pads(x.shape[1:3], shape[:2], (self.stride, self.stride), "SAME")
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        ends = [(count - 1) * self.stride + 1 for count in (rows, columns)]
        total = jnp.zeros((), x.dtype)
        for i, j in itertools.product(range(self.window), repeat=2):
            shifted = x[:, i : i + ends[0] : self.stride, j : j + ends[1] : self.stride]
            total += shifted * kernel[i, j, 0]
        return total


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm, and an activation.

    Attributes:
      features: output channels.
      window: rows and columns of the kernel.
      stride: of both.
      padding: as Flax has it.
      activation: comes last.
    """

    features: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Any = "SAME"
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c] -> [b, h/stride, w/stride, features]`."""
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, self.window, strides, self.padding, use_bias=False, name="conv")(x)
        return self.activation(BatchNorm(name="bn")(x))
