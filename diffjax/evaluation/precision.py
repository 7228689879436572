"""Precision, recall, density, coverage: are samples like real pictures, and are all real pictures met?"""

import math
from typing import NamedTuple

import numpy as np

from diffjax.evaluation.errorbars import Value, mean_error

_BLOCK = 256


class Fidelity(NamedTuple):
    """Shares in [0, 1], except that density may exceed 1.

    The errors say what another draw of the examples that are counted would change: of the samples for
    precision and density, of the real pictures for recall and coverage. The others are taken as given.

    Attributes:
      precision: samples that lie within the neighbourhood of a real picture (Kynkäänniemi et al., 2019).
      recall: real pictures that lie within the neighbourhood of a sample (the same).
      density: in how many real pictures' neighbourhoods a sample lies, over k (Naeem et al., 2020).
      coverage: real pictures in whose neighbourhood there is a sample (the same).
    """

    precision: Value
    recall: Value
    density: Value
    coverage: Value


def precision_recall_density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> Fidelity:
    """All four; a neighbourhood reaches to an example's k-th neighbour in its own set, without its rim.

    They depend on the numbers of examples: compare only what was measured with the same ones. Precision and
    recall suffer from outliers, whose neighbourhoods are large; density and coverage do so less.

    Args:
      real: features of real pictures, `[n, width]`, n > k.
      fake: features of samples, `[m, width]`, m > k.
      k: which neighbour; the papers take 3 (precision, recall) and 5.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake examples; expected more than k = {k} of each"
        )
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    reach_real, reach_fake = _reach(real, k), _reach(fake, k)
    inside = np.zeros(len(fake))  # in how many real neighbourhoods each sample lies
    recalled, covered = [], []
    for i in range(0, len(real), _BLOCK):
        distances = squared_distances(real[i : i + _BLOCK], fake)
        near = distances < reach_real[i : i + _BLOCK, None]
        inside += near.sum(axis=0)
        covered.append(near.any(axis=1))
        recalled.append((distances < reach_fake).any(axis=1))
    return Fidelity(
        _share(inside > 0),
        _share(np.concatenate(recalled)),
        mean_error(inside / k),
        _share(np.concatenate(covered)),
    )


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between all rows of two float64 arrays: `[n, width], [m, width] -> [n, m]`."""
    distances = (a**2).sum(axis=1)[:, None] - 2.0 * a @ b.T + (b**2).sum(axis=1)
    return distances.clip(0.0)


def _reach(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each example to its k-th neighbour but itself."""
    blocks = []
    for i in range(0, len(x), _BLOCK):
        distances = squared_distances(x[i : i + _BLOCK], x)
        blocks.append(np.partition(distances, k, axis=1)[:, k])  # the first, at 0, is the example itself
    return np.concatenate(blocks)


def _share(hits: np.ndarray) -> Value:
    share = float(hits.mean())
    return Value(share, math.sqrt(share * (1.0 - share) / len(hits)))
