import numpy as np
import pytest

from diffjax.evaluation.memorisation import memorisation, nearest

RNG = np.random.default_rng(0)
TRAINING = RNG.normal(size=(300, 6))


def test_neighbours_are_those_of_all_differences(monkeypatch):
    samples = RNG.normal(size=(20, 6))
    distances = np.linalg.norm(samples[:, None] - TRAINING, axis=-1)
    order = np.argsort(distances, axis=1)[:, :7]
    for block in (256, 3):
        monkeypatch.setattr("diffjax.evaluation.memorisation._BLOCK", block)
        found, far = nearest(samples, TRAINING, 7)
        np.testing.assert_array_equal(found, order)
        np.testing.assert_allclose(far, np.take_along_axis(distances, order, axis=1), rtol=1e-12)


def test_near_copies_far_from_zero_keep_their_digits():
    found, far = nearest(TRAINING[:5] + 1e6 + 1e-5, TRAINING + 1e6, 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(5))
    np.testing.assert_allclose(far[:, 0], 1e-5 * np.sqrt(6.0), rtol=1e-3)


def test_the_ratios():
    training = np.array([[3.0], [5.0], [11.0], [30.0]])
    found = memorisation(np.array([[1.0]]), training, count=3)
    assert (found.nearest[0], found.distance[0]) == (0, 2.0)
    assert found.to_second[0] == 2.0 / 4.0
    assert found.to_others[0] == 2.0 / 7.0  # the mean of 4 and 10; the fourth is not looked at


def test_copies_are_found():
    samples = np.concatenate([RNG.normal(size=(40, 6)), TRAINING[[7, 200]] + 0.01])
    found = memorisation(samples, TRAINING)
    assert set(found.suspects[:2]) == {40, 41}
    assert [pair[:2] for pair in sorted(found.pairs(2))] == [(40, 7), (41, 200)]
    assert found.pairs(2)[0][2] == found.to_others.min() < 0.05
    assert found.share.value == pytest.approx(2 / 42)
    assert memorisation(samples[:40], TRAINING).share.value == 0.0
    np.testing.assert_array_equal(np.sort(found.suspects), np.arange(42))


def test_copies_of_what_is_there_twice_are_found_too():
    training = np.concatenate([TRAINING, TRAINING[:1] + 1e-9])
    found = memorisation(TRAINING[:1] + 0.01, training)
    assert found.to_second[0] > 0.9  # the second nearest is as near
    assert found.to_others[0] < 0.05
    exact = memorisation(training[:2], np.repeat(training[:2], 60, axis=0))
    assert (exact.to_others == 0.0).all()
    assert exact.share.value == 1.0


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="count is 301; expected 1 to 300"):
        nearest(TRAINING, TRAINING, 301)
    assert memorisation(TRAINING[:2], TRAINING[:3]).to_others.shape == (2,)  # of fewer, all
