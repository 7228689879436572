"""A measured value and how far off it may be for want of examples."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Value(NamedTuple):
    """A measure with its standard error: where another draw of as many examples would lie, one sigma away.

    Attributes:
      value: the measure.
      error: its standard error; NaN where it cannot be known, as of a single example.
    """

    value: float
    error: float


def mean_error(values: np.ndarray) -> Value:
    """The mean of independent values `[n]` and its standard error; an infinite mean has no error."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2 or not math.isfinite(mean):
        return Value(mean, math.nan)
    return Value(mean, float(values.std(ddof=1)) / math.sqrt(len(values)))


def bootstrap(measure: Callable[..., float], *arrays: np.ndarray, draws: int = 50, seed: int = 0) -> Value:
    """A measure of examples, with Efron's (1979) standard error: its spread over resampled examples.

    The value is that of all examples as they are. Nothing that looks at nearest neighbours is to be
    resampled: a resample holds copies.

    Args:
      measure: of arrays that begin with the axis of examples.
      *arrays: as many examples each, drawn together: row i of one belongs to row i of the others.
      draws: resamples, at least 2.
      seed: of the draws.
    """
    count = len(arrays[0])
    rng = np.random.default_rng(seed)
    chosen = (rng.integers(0, count, count) for _ in range(draws))
    spread = [float(measure(*(array[rows] for array in arrays))) for rows in chosen]
    return Value(float(measure(*arrays)), float(np.std(spread, ddof=1)))


def jackknife(
    measure: Callable[[np.ndarray], float], array: np.ndarray, *, groups: int = 10, seed: int = 0
) -> Value:
    """A measure of examples, with the standard error of the jackknife that leaves out group after group.

    For measures whose size depends on the number of distinct examples, as that of a Fréchet distance of fewer
    examples than features: there a bootstrap's error is too large by half and more, this one's is right.

    Args:
      measure: of an array that begins with the axis of examples.
      array: the examples.
      groups: of equal size but for one example, drawn at random; at least 2.
      seed: of the draw.
    """
    group = np.random.default_rng(seed).permutation(len(array)) % groups
    values = [float(measure(array[group != out])) for out in range(groups)]
    return Value(float(measure(array)), math.sqrt((groups - 1) * float(np.var(values))))
