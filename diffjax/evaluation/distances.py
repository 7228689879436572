"""How far two sets of features are apart: Fréchet distance, KID and CMMD, with their errors."""

import math
from collections.abc import Callable

import numpy as np

from diffjax.evaluation.errorbars import Value, jackknife
from diffjax.evaluation.statistics import Moments, Statistics

_BLOCK = 256


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` (Fréchet, 1957; Heusel et al., 2017).

    The trace of the root is the sum of the singular values of `C_a^(1/2) C_b^(1/2)`, whose roots come
    from the eigenvalues of symmetric matrices. Unlike the general matrix root that pytorch-fid takes, that
    stays real and accurate where the covariances are singular, as of fewer pictures than features.
    """
    product = _factor(a.cov).T @ _factor(b.cov)
    root = np.linalg.svd(product, compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2.0 * root)


def frechet_to(reference: Moments | Statistics) -> Callable[[np.ndarray], float]:
    """The Fréchet distance of features `[n, width]`, n > 1, to a reference whose root is taken only once.

    With its error, which a bootstrap exaggerates: `jackknife(frechet_to(reference), features)`.
    """
    factor, trace = _factor(reference.cov), float(np.trace(reference.cov))

    def distance(features: np.ndarray) -> float:
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        seen = centred @ factor  # the root of the trace is that of whichever Gram matrix is smaller
        gram = seen.T @ seen if seen.shape[0] > seen.shape[1] else seen @ seen.T
        root = np.sqrt(np.linalg.eigvalsh(gram).clip(0.0)).sum()
        spread = (centred**2).sum() / (len(features) - 1)
        off = ((mean - reference.mean) ** 2).sum()
        return float(off + spread + trace - 2.0 * root / math.sqrt(len(features) - 1))

    return distance


def frechet_infinity(
    features: np.ndarray,
    reference: Moments | Statistics,
    *,
    parts: int = 5,
    groups: int = 10,
    seed: int = 0,
) -> Value:
    """The Fréchet distance of infinitely many samples, by a line in 1/N (Chong & Forsyth, 2020).

    With N samples the distance is too large by about c/N. Here it is measured on all n samples, on both
    halves, on all thirds …, in place of one random subset of each of 15 sizes; the line through the means is
    read off at 1/N = 0. It is a line only where even the smallest part has several times as many samples as
    features, and says nothing of the bias of a small reference.

    Args:
      features: `[n, width]`.
      reference: what they are compared with.
      parts: the largest number of parts; at least 2.
      groups: of the jackknife from which the error comes, each as dear as the value; 0 for no error.
      seed: of the samples' order.
    """
    distance = frechet_to(reference)
    number = np.arange(1, parts + 1)

    def extrapolated(features: np.ndarray) -> float:
        means = [np.mean([distance(part) for part in np.array_split(features, k)]) for k in number]
        return float(np.polynomial.Polynomial.fit(number, means, 1)(0.0))

    features = np.asarray(features)[np.random.default_rng(seed).permutation(len(features))]
    if not groups:
        return Value(extrapolated(features), math.nan)
    return jackknife(extrapolated, features, groups=groups, seed=seed)


def kid(a: np.ndarray, b: np.ndarray) -> Value:
    """KID (Bińkowski et al., 2018): the squared MMD with the kernel `(x.y / width + 1)^3`, without bias.

    All features are compared at once, which is the mean over all subsets of any size, where others draw some
    (`kid_subsets`). It can be negative. The error is the jackknife's, over the examples of both sets.

    Args:
      a: `[n, width]`, n > 2.
      b: `[m, width]`, m > 2.
    """
    return _mmd(a, b, _polynomial(a.shape[1]), unbiased=True)


def kid_subsets(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Value:
    """KID as torch-fidelity, torchmetrics and the papers give it: mean and *spread* over random subsets.

    Beside others' numbers. The spread is that of a subset, larger than the standard error of the mean.

    Args:
      a: `[n, width]`.
      b: `[m, width]`.
      subsets: how many.
      subset_size: examples of each set in each, without repetition; at most n and m.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(a), len(b))

    def drawn(x: np.ndarray) -> np.ndarray:
        return x[rng.choice(len(x), size, replace=False)]

    values = [kid(drawn(a), drawn(b)).value for _ in range(subsets)]
    return Value(float(np.mean(values)), float(np.std(values)))


def cmmd(a: np.ndarray, b: np.ndarray, *, sigma: float = 10.0, scale: float = 1000.0) -> Value:
    """CMMD: the squared MMD of CLIP embeddings with a Gaussian kernel (Jayasumana et al., 2024).

    As in the paper's code, embeddings are brought to length 1, the terms of a picture with itself count
    (which biases it upwards), and the result is multiplied by `scale`. The name stands for embeddings of CLIP
    ViT-L/14 at 336 px; of another network it is another measure.

    Args:
      a: `[n, width]`.
      b: `[m, width]`.
      sigma: the kernel is `exp(-|x - y|^2 / (2 sigma^2))`.
      scale: what the result is multiplied by.
    """
    found = _mmd(unit(a), unit(b), lambda dots: np.exp((dots - 1.0) / sigma**2), unbiased=False)
    return Value(scale * found.value, scale * found.error)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; rows of zeros stay."""
    x = np.asarray(x, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0.0, length, 1.0)


def _factor(cov: np.ndarray) -> np.ndarray:
    """`[width, rank]` whose product with its transpose is `cov`; what is only rounding is left out."""
    values, vectors = np.linalg.eigh(cov)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


Kernel = Callable[[np.ndarray], np.ndarray]
"""A kernel as a function of the inner products of two examples."""


def _polynomial(width: int) -> Kernel:
    return lambda dots: (dots / width + 1.0) ** 3


def _mmd(a: np.ndarray, b: np.ndarray, kernel: Kernel, *, unbiased: bool) -> Value:
    """The squared maximum mean discrepancy (Gretton et al., 2012), and the jackknife's error of it.

    Leaving out an example takes its row from the sums, so all of the jackknife costs no more than the sums.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    between, other = _row_sums(a, b, kernel), _row_sums(b, a, kernel)

    def within(x: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean of the kernel over pairs of x, and the means without each of its examples."""
        itself = kernel((x**2).sum(axis=1))
        rows = _row_sums(x, x, kernel) - (itself if unbiased else 0.0)
        total, n = rows.sum(), len(x)
        left = total - 2.0 * rows + (0.0 if unbiased else itself)
        return total / (n * (n - unbiased)), left / ((n - 1) * (n - 1 - unbiased))

    def across(rows: np.ndarray, m: int) -> np.ndarray:
        """The mean over pairs of the sets without each example of the one whose sums are given."""
        return (rows.sum() - rows) / ((len(rows) - 1) * m)

    (mean_a, left_a), (mean_b, left_b) = within(a), within(b)
    value = mean_a + mean_b - 2.0 * between.sum() / (len(a) * len(b))
    parts = (left_a - 2.0 * across(between, len(b)), left_b - 2.0 * across(other, len(a)))
    variance = sum((len(part) - 1) * part.var() for part in parts)
    return Value(float(value), math.sqrt(variance))


def _row_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """The kernel summed over y, for each of x; in blocks, so that no matrix of all pairs is held."""
    return np.concatenate([kernel(x[i : i + _BLOCK] @ y.T).sum(axis=1) for i in range(0, len(x), _BLOCK)])
