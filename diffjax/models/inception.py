"""Inception-v3 as the Fréchet Inception distance takes it (Szegedy et al., 2015; Heusel et al., 2017).

TensorFlow's network of 2015-12-05 differs from the one that is usually meant by the name: its averages leave
out what lies beyond the border, its last block takes a maximum where the others average, and it has 1008
classes. Source of these: the port to PyTorch in pytorch-fid, whose names the layers have here too.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.frozen import ConvNorm, average_around, max_pool

SIDE = 299
WIDTH = 2048
CLASSES = 1008

_Build = Callable[["_Chain", jax.Array], jax.Array]


class _Chain(nn.Module):
    """A block: `build` says what of it follows what."""

    build: _Build

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.build(self, x)

    def conv(
        self, x: jax.Array, name: str, features: int, window: tuple[int, int] = (1, 1), stride: int = 1
    ) -> jax.Array:
        """One convolution; those with a stride take whole windows only."""
        padding = "SAME" if stride == 1 else "VALID"
        return ConvNorm(features, window, stride, padding, name=f"branch{name}")(x)


def _a(pooled: int) -> _Build:
    def build(block: _Chain, x: jax.Array) -> jax.Array:
        five = block.conv(block.conv(x, "5x5_1", 48), "5x5_2", 64, (5, 5))
        three = block.conv(block.conv(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
        three = block.conv(three, "3x3dbl_3", 96, (3, 3))
        around = block.conv(average_around(x), "_pool", pooled)
        return jnp.concatenate([block.conv(x, "1x1", 64), five, three, around], -1)

    return build


def _b(block: _Chain, x: jax.Array) -> jax.Array:
    three = block.conv(block.conv(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
    three = block.conv(three, "3x3dbl_3", 96, (3, 3), 2)
    return jnp.concatenate([block.conv(x, "3x3", 384, (3, 3), 2), three, max_pool(x)], -1)


def _c(inner: int) -> _Build:
    def build(block: _Chain, x: jax.Array) -> jax.Array:
        seven = block.conv(block.conv(x, "7x7_1", inner), "7x7_2", inner, (1, 7))
        seven = block.conv(seven, "7x7_3", 192, (7, 1))
        double = block.conv(block.conv(x, "7x7dbl_1", inner), "7x7dbl_2", inner, (7, 1))
        double = block.conv(block.conv(double, "7x7dbl_3", inner, (1, 7)), "7x7dbl_4", inner, (7, 1))
        double = block.conv(double, "7x7dbl_5", 192, (1, 7))
        around = block.conv(average_around(x), "_pool", 192)
        return jnp.concatenate([block.conv(x, "1x1", 192), seven, double, around], -1)

    return build


def _d(block: _Chain, x: jax.Array) -> jax.Array:
    three = block.conv(block.conv(x, "3x3_1", 192), "3x3_2", 320, (3, 3), 2)
    seven = block.conv(block.conv(x, "7x7x3_1", 192), "7x7x3_2", 192, (1, 7))
    seven = block.conv(block.conv(seven, "7x7x3_3", 192, (7, 1)), "7x7x3_4", 192, (3, 3), 2)
    return jnp.concatenate([three, seven, max_pool(x)], -1)


def _e(pool: Callable[[jax.Array], jax.Array]) -> _Build:
    def build(block: _Chain, x: jax.Array) -> jax.Array:
        def crossed(x: jax.Array, name: str) -> list[jax.Array]:
            return [block.conv(x, f"{name}a", 384, (1, 3)), block.conv(x, f"{name}b", 384, (3, 1))]

        three = crossed(block.conv(x, "3x3_1", 384), "3x3_2")
        double = block.conv(block.conv(x, "3x3dbl_1", 448), "3x3dbl_2", 384, (3, 3))
        around = block.conv(pool(x), "_pool", 192)
        return jnp.concatenate([block.conv(x, "1x1", 320), *three, *crossed(double, "3x3dbl_3"), around], -1)

    return build


def _largest_around(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


_BLOCKS: dict[str, _Build] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d,
    "Mixed_7b": _e(average_around),
    "Mixed_7c": _e(_largest_around),
}


class Inception(nn.Module):
    """Pictures to TensorFlow's `pool3` and to logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Look at pictures.

        Args:
          x: `[n, 299, 299, 3]`, from -1 to 1.

        Returns:
          features `[n, 2048]` and logits `[n, 1008]`, of which the bias is left out, as in the original
          Inception score (Salimans et al., 2016) and in torch-fidelity.
        """

        def conv(
            x: jax.Array, name: str, features: int, window: int, stride: int = 1, pad: int = 0
        ) -> jax.Array:
            padding = ((pad, pad), (pad, pad))
            return ConvNorm(features, (window, window), stride, padding, name=name)(x)

        x = conv(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = conv(conv(x, "Conv2d_2a_3x3", 32, 3), "Conv2d_2b_3x3", 64, 3, pad=1)
        x = conv(conv(max_pool(x), "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3)
        x = max_pool(x)
        for name, build in _BLOCKS.items():
            x = _Chain(build, name=name)(x)
        x = x.mean(axis=(1, 2))
        return x, nn.Dense(CLASSES, use_bias=False, name="fc")(x)
