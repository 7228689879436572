from pathlib import Path

import numpy as np
import pytest

from diffjax.evaluation.precision import precision_recall_density_coverage

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")
A, B = GOLDEN["features/a"], GOLDEN["features/b"]


def values(fidelity):
    return [part.value for part in fidelity]


def test_against_prdc():
    found = precision_recall_density_coverage(A, B, k=5)
    np.testing.assert_allclose(values(found), GOLDEN["precision/prdc"], rtol=1e-12)
    assert 0.0 < found.precision.value < 1.0  # the golden values are not at an end
    assert 0.0 < found.recall.value < 1.0


def test_against_torch_fidelity():
    found = precision_recall_density_coverage(A, B, k=3)
    np.testing.assert_allclose(values(found)[:2], GOLDEN["precision/torch_fidelity"], rtol=1e-6)


def test_blocks_do_not_show(monkeypatch):
    whole = precision_recall_density_coverage(A, B[:70])
    monkeypatch.setattr("diffjax.evaluation.precision._BLOCK", 13)
    assert precision_recall_density_coverage(A, B[:70]) == whole


@pytest.mark.parametrize("k", [1, 5])
def test_identical_sets(k):
    """Each neighbourhood holds its own middle and the k - 1 nearest: a density of k / k."""
    found = precision_recall_density_coverage(A, A.copy(), k=k)
    assert values(found) == pytest.approx([1.0, 1.0, 1.0, 1.0])


def test_sets_far_apart():
    assert values(precision_recall_density_coverage(A, A + 100.0)) == [0.0, 0.0, 0.0, 0.0]


def test_a_lost_half_and_an_invented_one():
    rng = np.random.default_rng(0)
    left, right, far = (rng.normal(mean, 0.1, size=(200, 2)) for mean in (0.0, 50.0, -50.0))
    lost = precision_recall_density_coverage(np.concatenate([left, right]), left)
    invented = precision_recall_density_coverage(left, np.concatenate([left, far]))
    assert values(lost) == pytest.approx([1.0, 0.5, 1.0, 0.5])
    assert values(invented) == pytest.approx([0.5, 1.0, 0.5, 1.0])


def test_known_neighbourhoods():
    """On a line, worked out by hand; the rim of a neighbourhood is not in it."""
    real, fake = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [2.0], [9.0], [9.5]])
    found = precision_recall_density_coverage(real, fake, k=1)  # reaches: 1, 1, 2; and 1.5, 1.5, 0.5, 0.5
    assert values(found) == [2 / 4, 3 / 3, 3 / 4, 3 / 3]
    np.testing.assert_allclose(found.precision.error, np.sqrt(0.5 * 0.5 / 4))
    np.testing.assert_allclose(found.density.error, np.std([2, 1, 0, 0], ddof=1) / 2)


def test_errors_cover_the_mean_over_draws():
    rng, found = np.random.default_rng(1), []
    real = rng.normal(size=(200, 4))
    found = [precision_recall_density_coverage(real, 1.4 * rng.normal(size=(100, 4))) for _ in range(80)]
    for name in ("precision", "density"):
        parts = [getattr(one, name) for one in found]
        mean = np.mean([part.value for part in parts])
        assert 0.85 <= np.mean([abs(p.value - mean) < 2.0 * p.error for p in parts]) <= 1.0


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="5 real and 120 fake examples; expected more than k = 5"):
        precision_recall_density_coverage(A[:5], B)
