"""Images at another resolution: how a stage's low-resolution images are made, and brought to its own size."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def downsample(images: jax.Array, factor: int) -> jax.Array:
    """Mean over boxes of `factor` x `factor` pixels: `[b, h, w, c] -> [b, h/factor, w/factor, c]`."""
    b, h, w, c = images.shape
    return images.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))


def upsample(images: jax.Array, factor: int) -> jax.Array:
    """Bilinear interpolation: `[b, h, w, c] -> [b, h*factor, w*factor, c]`."""
    b, h, w, c = images.shape
    return jax.image.resize(images, (b, h * factor, w * factor, c), "bilinear")


def upsample_corners(images: jax.Array, factor: int) -> jax.Array:
    """Bilinear interpolation in which the corner pixels stay in the corners (DeepFloyd IF)."""
    b, h, w, c = images.shape
    shape = (b, h * factor, w * factor, c)
    # Pixel i of the result lies at i (h - 1) / (h factor - 1); `scale_and_translate` counts pixels' middles.
    scale = jnp.array([(n * factor - 1) / max(n - 1, 1) for n in (h, w)])
    return jax.image.scale_and_translate(
        images, shape, (1, 2), scale, 0.5 - 0.5 * scale, "bilinear", antialias=False
    )


UPSAMPLINGS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "bilinear": upsample,
    "bilinear_corners": upsample_corners,
}
