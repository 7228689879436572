"""Pictures as the feature networks want them: uint8 `[n, h, w, 3]` to their size, on the host."""

from collections.abc import Callable

import numpy as np
from PIL import Image

_BICUBIC = Image.Resampling.BICUBIC


def unchanged(images: np.ndarray) -> np.ndarray:
    """For networks whose resizing is part of the program."""
    return images


def whole(side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Pillow's bicubic filter, to a square whatever the shape was: uint8."""

    def prepare(images: np.ndarray) -> np.ndarray:
        if images.shape[1:3] == (side, side):
            return images
        return np.stack([np.asarray(Image.fromarray(i).resize((side, side), _BICUBIC)) for i in images])

    return prepare


def cropped(side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Pillow's bicubic filter, the shorter side to `side`, and of the longer one the middle: uint8."""

    def prepare(images: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        short = min(height, width)
        height, width = side * height // short, side * width // short
        top, left = (height - side) // 2, (width - side) // 2
        resized = [np.asarray(Image.fromarray(i).resize((width, height), _BICUBIC)) for i in images]
        return np.stack(resized)[:, top : top + side, left : left + side]

    return prepare


def unrounded(side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Pillow's bicubic filter, to a square whatever the shape was, as clean-fid has it: float32, 0 to 255.

    Source: Parmar et al., 2022; `cleanfid/resize.py`.
    """

    def channel(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values.astype(np.float32))
        return np.asarray(image.resize((side, side), _BICUBIC)).clip(0, 255)

    def prepare(images: np.ndarray) -> np.ndarray:
        return np.stack([np.stack([channel(image[..., c]) for c in range(3)], axis=-1) for image in images])

    return prepare
