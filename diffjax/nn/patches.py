"""Images as rows of patches, and back."""

import jax


def patchify(images: jax.Array, patch: int, *, channel_first: bool = False) -> jax.Array:
    """Cut images into patches, row by row.

    Args:
      images: `[batch, height, width, channels]`.
      patch: side of a patch; it must divide height and width.
      channel_first: the features of a patch are ordered by channel, row and column, as FLUX packs latents;
        else by row, column and channel.

    Returns:
      `[batch, tokens, patch * patch * channels]`.
    """
    b, h, w, c = images.shape
    if h % patch or w % patch:
        raise ValueError(f"image of {h} x {w} is not divisible into patches of {patch}")
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    x = x.transpose(0, 1, 3, 5, 2, 4) if channel_first else x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(
    tokens: jax.Array, patch: int, height: int, width: int, *, channel_first: bool = False
) -> jax.Array:
    """The inverse of `patchify` for images of `height` x `width`."""
    b, _, features = tokens.shape
    rows, columns, channels = height // patch, width // patch, features // (patch * patch)
    if channel_first:
        x = tokens.reshape(b, rows, columns, channels, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = tokens.reshape(b, rows, columns, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, channels)
