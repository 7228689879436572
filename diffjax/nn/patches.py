"""Images as rows of patches, and back."""

import jax


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """`[batch, height, width, channels] -> [batch, tokens, patch * patch * channels]`, row by row."""
    b, h, w, c = images.shape
    if h % patch or w % patch:
        raise ValueError(f"image of {h} x {w} is not divisible into patches of {patch}")
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of `patchify` for images of `height` x `width`."""
    b, _, features = tokens.shape
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, features // (patch * patch))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)
