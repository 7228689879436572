import numpy as np
import pytest

from diffjax.evaluation.retrieval import Retrieval, nearest_pictures, retrieval, shuffled


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)


def test_a_picture_is_nearest_to_itself_and_then_by_distance():
    gallery = pictures(20)
    nearest = nearest_pictures(gallery[[3, 17]], gallery)
    assert nearest.shape == (2, 5)
    np.testing.assert_array_equal(nearest[:, 0], [3, 17])
    distances = ((gallery.astype(np.float64) - gallery[3]) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_array_equal(nearest[0], np.argsort(distances)[:5])


def test_distances_do_not_wrap_around_in_uint8():
    gallery = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (0, 100, 255)])
    nearest = nearest_pictures(np.full((1, 2, 2, 3), 250, np.uint8), gallery, count=3)
    np.testing.assert_array_equal(nearest, [[2, 1, 0]])


def test_scores_of_constructed_cases():
    concepts = ["cat", "cat", "dog", "sun", "sun", "car", "bus"]
    nearest = np.array(
        [
            [0, 2, 3, 4, 5],  # a cat first
            [2, 3, 4, 5, 1],  # a cat fifth
            [3, 4, 5, 6, 2],  # no cat
            [1, 0, 2, 3, 4],  # two cats, but a dog was asked for; third
        ]
    )
    score = retrieval(nearest, concepts, ["cat", "cat", "cat", "dog"])
    assert score == Retrieval(top1=0.25, top5=0.75)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shuffled_keeps_everything_and_leaves_nothing_in_place(count):
    concepts = [f"concept {i}" for i in range(count)]
    for seed in range(20):
        other = shuffled(concepts, seed)
        assert sorted(other) == sorted(concepts)
        assert all(here != there for here, there in zip(concepts, other, strict=True))
        assert other == shuffled(concepts, seed)
    assert count == 2 or len({tuple(shuffled(concepts, seed)) for seed in range(20)}) > 1
