from pathlib import Path

import numpy as np
import pytest

from diffjax.evaluation.distances import (
    cmmd,
    frechet_distance,
    frechet_infinity,
    frechet_to,
    kid,
    kid_subsets,
    unit,
)
from diffjax.evaluation.errorbars import bootstrap, jackknife
from diffjax.evaluation.statistics import Moments, Statistics

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")
A, B = GOLDEN["features/a"], GOLDEN["features/b"]


def moments(features):
    return Moments(features.shape[1]).add(features)


def positive(width, rank, seed):
    root = np.random.default_rng(seed).normal(size=(width, rank))
    return root @ root.T


def coverage(found, truth):
    """The share of values that lie within two of their errors of the truth."""
    return np.mean([abs(value - truth) < 2.0 * error for value, error in found])


def test_frechet_against_others():
    found = frechet_distance(moments(A), moments(B))
    np.testing.assert_allclose(found, GOLDEN["frechet/torch_fidelity"], rtol=1e-9)
    np.testing.assert_allclose(found, GOLDEN["frechet/torchmetrics"], rtol=1e-9)


@pytest.mark.parametrize("rank", [12, 5, 1])
def test_frechet_of_two_gaussians(rank):
    """With `C_b = T C_a T`, T symmetric, the root's trace is that of `T C_a`; also where C_a is singular."""
    cov, transport = positive(12, rank, 0), positive(12, 12, 1)
    a = Statistics(np.zeros(12), cov)
    b = Statistics(np.full(12, 0.5), transport @ cov @ transport)
    expected = 3.0 + np.trace(a.cov) + np.trace(b.cov) - 2.0 * np.trace(transport @ cov)
    for pair in ((a, b), (b, a)):
        np.testing.assert_allclose(frechet_distance(*pair), expected, rtol=1e-12)


def test_frechet_of_equals_is_zero_where_a_matrix_root_goes_astray():
    """Of fewer pictures than features."""
    few = moments(np.random.default_rng(2).normal(size=(20, 200)))
    assert abs(frechet_distance(few, few)) < 1e-10
    still = Statistics(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(still, Statistics(np.ones(3), np.zeros((3, 3)))) == 3.0


@pytest.mark.parametrize(("count", "others"), [(120, 120), (10, 120), (120, 10), (9, 8)])
def test_frechet_of_features_is_that_of_their_moments(count, others):
    reference = moments(B[:others])
    expected = frechet_distance(moments(A[:count]), reference)
    np.testing.assert_allclose(frechet_to(reference)(A[:count]), expected, rtol=1e-7)


class Gaussians:
    """Features of which the distance to the reference is known."""

    def __init__(self, width=6):
        mix = np.eye(width) + 0.3 * np.random.default_rng(0).normal(size=(width, width))
        self.mix = mix
        self.reference = Statistics(np.full(width, 0.2), np.eye(width))
        self.truth = frechet_distance(Statistics(np.zeros(width), mix @ mix.T), self.reference)

    def draw(self, count, rng):
        return rng.normal(size=(count, len(self.mix))) @ self.mix.T


def test_the_extrapolation_finds_infinitely_many_and_its_errors_cover_them():
    gaussians, rng = Gaussians(), np.random.default_rng(1)
    samples = [gaussians.draw(150, rng) for _ in range(60)]
    found = [frechet_infinity(x, gaussians.reference, seed=i) for i, x in enumerate(samples)]
    plain = [frechet_to(gaussians.reference)(x) for x in samples]
    spread = np.std(plain) / np.sqrt(60)
    assert np.mean(plain) - gaussians.truth > 3.0 * spread  # too large by more than chance …
    assert abs(np.mean([value for value, _ in found]) - gaussians.truth) < 2.5 * spread  # … which is mended
    assert 0.85 <= coverage(found, gaussians.truth) <= 1.0
    np.testing.assert_allclose(
        np.mean([error for _, error in found]), np.std([v for v, _ in found]), rtol=0.3
    )


def test_the_extrapolation_is_the_line_through_its_parts():
    reference = moments(B)
    features = A[np.random.default_rng(3).permutation(120)]
    distance = frechet_to(reference)
    both = np.mean([distance(part) for part in np.split(features, 2)])
    found = frechet_infinity(A, reference, parts=2, groups=0, seed=3)
    np.testing.assert_allclose(found.value, 2.0 * distance(features) - both, rtol=1e-9)
    assert np.isnan(found.error)


@pytest.mark.parametrize("way", [bootstrap, jackknife])
def test_errors_of_a_distance_cover_its_mean(way):
    gaussians, rng = Gaussians(), np.random.default_rng(2)
    distance = frechet_to(gaussians.reference)
    found = [way(distance, gaussians.draw(100, rng), seed=i) for i in range(60)]
    assert 0.85 <= coverage(found, np.mean([value for value, _ in found])) <= 1.0


def test_kid_against_others():
    for name in ("torchmetrics", "torch_fidelity"):
        np.testing.assert_allclose(kid(A, B).value, GOLDEN[f"kid/{name}"], rtol=1e-9)
    found = kid_subsets(A, B, subsets=2)  # whose size is at most what there is
    np.testing.assert_allclose(found.value, GOLDEN["kid/subsets"][0], rtol=1e-9)
    np.testing.assert_allclose(found.error, GOLDEN["kid/subsets"][1], atol=1e-9 * found.value)


def test_subsets_tend_to_all_pairs():
    found, whole = kid_subsets(A, B[:90], subsets=400, subset_size=30), kid(A, B[:90])
    assert abs(found.value - whole.value) < 4.0 * found.error / 20.0


def test_cmmd_against_others():
    np.testing.assert_allclose(cmmd(A, B).value, GOLDEN["cmmd/torch_fidelity"], rtol=1e-9)
    assert cmmd(A, 3.0 * A).value == pytest.approx(0.0, abs=1e-9)  # only directions count


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_the_error_is_that_of_leaving_out_one_after_the_other(measure):
    """The textbook's jackknife of two samples; and whatever the blocks."""
    a, b = A[:7], B[:9]
    left_a = [measure(np.delete(a, i, 0), b).value for i in range(7)]
    left_b = [measure(a, np.delete(b, i, 0)).value for i in range(9)]
    expected = np.sqrt(6.0 * np.var(left_a) + 8.0 * np.var(left_b))
    np.testing.assert_allclose(measure(a, b).error, expected, rtol=1e-8)


def test_blocks_do_not_show(monkeypatch):
    whole = kid(A, B[:50])
    monkeypatch.setattr("diffjax.evaluation.distances._BLOCK", 7)
    np.testing.assert_allclose(kid(A, B[:50]), whole, rtol=1e-12)


def test_kid_of_equal_distributions_is_zero_on_average_and_its_errors_cover_that():
    rng = np.random.default_rng(3)
    found = [kid(rng.normal(size=(60, 6)), rng.normal(size=(80, 6))) for _ in range(200)]
    values = np.array([value for value, _ in found])
    assert abs(values.mean()) < 3.0 * values.std() / np.sqrt(200)
    assert (values < 0.0).mean() > 0.3
    assert coverage(found, 0.0) >= 0.93


def test_errors_of_kid_cover_distributions_that_differ():
    """`E (x.y / d + 1)^3` for d = 1 and normal x, y is 1 + 3 E(xy)^2 + 3 E xy + E(xy)^3, in closed form."""
    shift, rng = 0.7, np.random.default_rng(4)
    raw = {mean: (mean, 1.0 + mean**2, mean**3 + 3.0 * mean) for mean in (0.0, shift)}

    def kernel(a, b):
        first, second, third = (x * y for x, y in zip(raw[a], raw[b], strict=True))
        return 1.0 + 3.0 * first + 3.0 * second + third

    truth = kernel(0.0, 0.0) + kernel(shift, shift) - 2.0 * kernel(0.0, shift)
    found = [kid(rng.normal(size=(80, 1)), rng.normal(shift, size=(80, 1))) for _ in range(200)]
    assert 0.85 <= coverage(found, truth) <= 1.0


def test_unit_length():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
