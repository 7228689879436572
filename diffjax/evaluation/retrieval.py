"""Caption retrieval: does a sample look most like the training pictures of what its prompt names?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Retrieval(NamedTuple):
    """Shares of prompts in [0, 1].

    Attributes:
      top1: the nearest picture shows the prompt's concept.
      top5: at least one of the five nearest does.
    """

    top1: float
    top5: float


def nearest_pictures(samples: np.ndarray, gallery: np.ndarray, count: int = 5) -> np.ndarray:
    """Indices of the nearest pictures in mean squared pixel distance.

    Args:
      samples: uint8 `[n, h, w, 3]`.
      gallery: uint8 `[m, h, w, 3]`.
      count: how many; at most m.

    Returns:
      `[n, count]`, nearest first.
    """
    a = samples.reshape(len(samples), -1).astype(np.float64)
    b = gallery.reshape(len(gallery), -1).astype(np.float64)
    distances = (a**2).sum(1)[:, None] - 2.0 * a @ b.T + (b**2).sum(1)[None, :]
    return np.argsort(distances, axis=1, kind="stable")[:, :count]


def retrieval(nearest: np.ndarray, gallery_concepts: Sequence[str], concepts: Sequence[str]) -> Retrieval:
    """Score neighbours against the concepts that the prompts named.

    Args:
      nearest: `[n, 5]`, from `nearest_pictures`.
      gallery_concepts: the concept of each picture in the gallery.
      concepts: the concept of each prompt, `n` of them.
    """
    hits = np.asarray(gallery_concepts, dtype=object)[nearest] == np.asarray(concepts, dtype=object)[:, None]
    return Retrieval(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()))


def shuffled(concepts: Sequence[str], seed: int) -> list[str]:
    """The same concepts in an order in which none stays in place: the control of a retrieval score."""
    order = np.random.default_rng(seed).permutation(len(concepts))
    result = list(concepts)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        result[here] = concepts[there]
    return result
