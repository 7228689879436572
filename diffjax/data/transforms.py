"""Transforms of loaded elements: dicts with an `image` of `[height, width, channels]`, uint8."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.errors import UserError

Element = dict[str, Any]


def downsample(image: np.ndarray, factor: int) -> np.ndarray:
    """Average boxes of `factor` by `factor` pixels.

    Args:
      image: `[..., height, width, channels]` uint8, whose height and width are divisible by `factor`.
      factor: how many times smaller the result is.

    Returns:
      `[..., height/factor, width/factor, channels]` uint8: the means, rounded to the nearest (ties to even).
    """
    *batch, height, width, channels = image.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"an image of {height}x{width} pixels cannot be averaged over boxes of {factor}")
    boxes = image.reshape(*batch, height // factor, factor, width // factor, factor, channels)
    return np.rint(boxes.mean(axis=(-4, -2), dtype=np.float32)).astype(np.uint8)


def resize(from_resolution: int, to_resolution: int) -> Callable[[Element], Element]:
    """A transform that brings images from the stored resolution to a smaller one, by averaging boxes.

    Raises:
      UserError: if the ratio is not a whole number; anything else would blur or invent pixels unnoticed.
    """
    factor, rest = divmod(from_resolution, to_resolution) if to_resolution > 0 else (0, 1)
    if rest or not factor:
        raise UserError(
            f"Pictures of {from_resolution} px cannot be brought to {to_resolution} px: "
            "the stored resolution must be a whole multiple of the wanted one."
        )

    def transform(element: Element) -> Element:
        return {**element, "image": downsample(element["image"], factor)}

    return transform


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Crops a square of `size` pixels at a random place.

    It has the method of grain's `RandomMap`, and grain gives it a generator that depends on the seed and on
    the element's place in the order alone: the same crop after a restart, another one in the next epoch.
    """

    size: int

    def random_map(self, element: Element, rng: np.random.Generator) -> Element:
        """Crop `element["image"]`."""
        height, width, _ = element["image"].shape
        if self.size > min(height, width):
            raise UserError(f"A picture of {height}x{width} pixels is too small for a crop of {self.size}.")
        top = rng.integers(height - self.size + 1)
        left = rng.integers(width - self.size + 1)
        return {**element, "image": element["image"][top : top + self.size, left : left + self.size]}


def random_crop(size: int) -> RandomCrop:
    """A transform that crops a square of `size` pixels at a random place, deterministically."""
    return RandomCrop(size)


class RandomFlip:
    """Mirrors half of the pictures left to right; as deterministic as `RandomCrop`."""

    def random_map(self, element: Element, rng: np.random.Generator) -> Element:
        """Mirror `element["image"]`, or not."""
        return {**element, "image": element["image"][:, ::-1]} if rng.random() < 0.5 else element


def random_flip() -> RandomFlip:
    """A transform that mirrors half of the pictures left to right, deterministically."""
    return RandomFlip()
