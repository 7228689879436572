"""Whether samples are copies: the nearest training pictures, and how much nearer they are than others."""

from typing import NamedTuple

import numpy as np

from diffjax.evaluation.errorbars import Value, mean_error
from diffjax.evaluation.precision import squared_distances

_BLOCK = 256


def nearest(samples: np.ndarray, gallery: np.ndarray, count: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """The nearest examples of a gallery, in Euclidean distance.

    Args:
      samples: features, `[n, width]`.
      gallery: features, `[m, width]`.
      count: how many; at most m.

    Returns:
      indices and distances, both `[n, count]`, nearest first.
    """
    if not 1 <= count <= len(gallery):
        raise ValueError(f"count is {count}; expected 1 to {len(gallery)}, the size of the gallery")
    samples, gallery = np.asarray(samples, np.float64), np.asarray(gallery, np.float64)
    indices, distances = [], []
    for i in range(0, len(samples), _BLOCK):
        block = samples[i : i + _BLOCK]
        found = np.argsort(squared_distances(block, gallery), axis=1, kind="stable")[:, :count]
        # The difference of squares loses the digits of what is nearly equal, which is what is looked for.
        exact = [np.linalg.norm(gallery[rows] - row, axis=1) for row, rows in zip(block, found, strict=True)]
        order = np.argsort(exact, axis=1, kind="stable")
        indices.append(np.take_along_axis(found, order, axis=1))
        distances.append(np.take_along_axis(np.stack(exact), order, axis=1))
    return np.concatenate(indices), np.concatenate(distances)


class Memorisation(NamedTuple):
    """Nearest training pictures of samples; all arrays are `[n]`.

    Attributes:
      nearest: which training picture is nearest.
      distance: to that.
      to_second: that distance over the one to the second nearest. Yoon et al. (2023) call a sample memorised
        where it is below 1/3; where training pictures are there twice, that misses their copies.
      to_others: that distance over the mean of those to the 2nd … 50th nearest, as Carlini et al. (2023)
        compare them; 0 for a copy, near 1 for what is like many.
      share: the share of samples that `to_second` calls memorised.
      suspects: the samples, most suspicious (the lowest `to_others`) first.
    """

    nearest: np.ndarray
    distance: np.ndarray
    to_second: np.ndarray
    to_others: np.ndarray
    share: Value
    suspects: np.ndarray

    def pairs(self, count: int) -> list[tuple[int, int, float]]:
        """(sample, its nearest training picture, `to_others`) of the most suspicious, for a sheet."""
        return [(int(i), int(self.nearest[i]), float(self.to_others[i])) for i in self.suspects[:count]]


def memorisation(
    samples: np.ndarray, training: np.ndarray, *, count: int = 50, below: float = 1.0 / 3.0
) -> Memorisation:
    """Compare samples with their nearest training pictures.

    What is nearest depends on the features. Held-out pictures, compared in the same way, say which ratios are
    usual where nothing was memorised.

    Args:
      samples: features, `[n, width]`.
      training: features of the training pictures, `[m, width]`, m > 1.
      count: neighbours that are looked at, fewer where there are fewer pictures.
      below: the ratio to the second nearest that tells memorised samples.
    """
    indices, distances = nearest(samples, training, min(count, len(training)))
    first, second, others = distances[:, 0], distances[:, 1], distances[:, 1:].mean(axis=1)
    # Several copies of one picture are at distance 0, all of them: a copy is a copy.
    to_second = np.divide(first, second, out=np.zeros_like(first), where=second > 0.0)
    to_others = np.divide(first, others, out=np.zeros_like(first), where=others > 0.0)
    order = np.argsort(to_others, kind="stable")
    return Memorisation(indices[:, 0], first, to_second, to_others, mean_error(to_second < below), order)
