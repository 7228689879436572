"""LPIPS, a learned perceptual distance of two pictures (Zhang et al., 2018), version 0.1.

The layers have torchvision's names, `features.0` and so on, and those of the package lpips, `lin0`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# (the number of the layer in torchvision's `features`, output channels, side of the window, stride, padding)
_ALEX = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
_VGG = tuple(
    (number, channels, 3, 1, 1)
    for number, channels in zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        (64, 64, 128, 128, 256, 256, 256, *(512,) * 6),
        strict=True,
    )
)
# Per network: its convolutions; before which of them there is a maximum over a window of which side; after
# which of them the feature maps are compared.
NETWORKS = {
    "alex": (_ALEX, (3, 6), 3, (0, 3, 6, 8, 10)),
    "vgg": (_VGG, (5, 10, 17, 24), 2, (2, 7, 14, 21, 28)),
}
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class Lpips(nn.Module):
    """Distance of pairs of pictures.

    Attributes:
      network: "alex" or "vgg".
    """

    network: str = "alex"

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Compare `[n, h, w, 3]` with as many, from -1 to 1, of 32 x 32 at least: `[n]`, 0 if equal."""
        maps = self._maps((jnp.concatenate([a, b]) - _SHIFT) / _SCALE)
        total = jnp.zeros(len(a), jnp.float32)
        for index, x in enumerate(maps):
            x = x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-10)
            apart = jnp.square(x[: len(a)] - x[len(a) :])
            total += nn.Dense(1, use_bias=False, name=f"lin{index}")(apart).mean(axis=(1, 2, 3))
        return total

    def _maps(self, x: jax.Array) -> Sequence[jax.Array]:
        convolutions, pooled, side, compared = NETWORKS[self.network]
        maps = []
        for number, channels, window, stride, pad in convolutions:
            if number in pooled:
                x = nn.max_pool(x, (side, side), (2, 2))
            padding = ((pad, pad), (pad, pad))
            layer = nn.Conv(channels, (window, window), (stride, stride), padding, name=f"features_{number}")
            x = jax.nn.relu(layer(x))
            if number in compared:
                maps.append(x)
        return maps
