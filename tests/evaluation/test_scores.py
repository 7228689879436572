import math
from pathlib import Path

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.evaluation.scores import clip_s, clip_score, diversity, inception_score, r_precision

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")


def test_inception_score_against_others():
    logits = GOLDEN["logits"]
    found = inception_score(logits, seed=None)
    np.testing.assert_allclose(found, GOLDEN["inception/torch_fidelity"], rtol=1e-9)
    whole = inception_score(logits, splits=1)
    np.testing.assert_allclose(whole.value, GOLDEN["inception/torchmetrics"], rtol=1e-9)


def test_inception_score_at_its_ends():
    assert inception_score(np.zeros((50, 7))).value == pytest.approx(1.0)
    sure = np.tile(1e4 * np.eye(7), (10, 1))  # a softmax of which underflows to 0
    assert inception_score(sure, splits=1) == pytest.approx((7.0, 0.0))
    assert inception_score(sure, splits=10, seed=None) == pytest.approx((7.0, 0.0))
    assert inception_score(np.tile(sure[:1], (30, 1))).value == pytest.approx(1.0)


def test_pictures_are_shuffled_before_they_are_split():
    ordered = np.repeat(1e4 * np.eye(10), 30, axis=0)
    assert inception_score(ordered, seed=None).value == pytest.approx(1.0)
    assert inception_score(ordered).value > 8.0


def test_more_splits_than_pictures_are_refused():
    with pytest.raises(UserError, match="of 7 pictures cannot be split into 10 parts"):
        inception_score(np.zeros((7, 3)))


def test_clip_scores():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [1.0, 1.0]])
    texts = np.array([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])  # cosines 1, 0, -1, sqrt(1/2)
    positive = np.array([1.0, 0.0, 0.0, math.sqrt(0.5)])
    error = positive.std(ddof=1) / 2.0
    assert clip_score(images, texts) == pytest.approx((100.0 * positive.mean(), 100.0 * error))
    assert clip_s(images, texts) == pytest.approx((2.5 * positive.mean(), 2.5 * error))


CAPTIONS = [f"caption {i}" for i in range(40)]


def test_retrieval_at_its_ends():
    texts = np.eye(40)
    assert r_precision(3.0 * texts, texts, CAPTIONS, wrong=39) == (1.0, 0.0)
    assert r_precision(np.roll(texts, 1, axis=0), texts, CAPTIONS, wrong=39) == (0.0, 0.0)
    assert r_precision(np.ones((40, 40)), texts, CAPTIONS, wrong=1).value == 0.0  # all are as near


def test_chance_retrieves_one_in_as_many_and_the_error_covers_it():
    rng = np.random.default_rng(0)
    captions = [f"caption {i}" for i in range(300)]
    found = [
        r_precision(rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), captions, wrong=4, seed=i)
        for i in range(20)
    ]
    assert np.mean([value for value, _ in found]) == pytest.approx(0.2, abs=0.02)
    assert np.mean([abs(value - 0.2) < 2.0 * error for value, error in found]) >= 0.85


def test_a_repeated_caption_is_not_wrong_for_its_like():
    texts, captions = np.eye(4)[[0, 0, 1, 2, 3]], ["a", "a", "b", "c", "d"]
    assert r_precision(texts, texts, captions, wrong=3) == (1.0, 0.0)
    with pytest.raises(UserError, match="4 wrong captions needs 5 different ones; there are 4"):
        r_precision(texts, texts, captions, wrong=4)


def test_every_wrong_caption_is_drawn():
    """Which of them is nearest decides, so with all but one drawn the score tells which one was not."""
    texts = np.eye(5)
    images = texts + 2.0 * np.roll(texts, 1, axis=1)  # nearer to the next caption than to their own
    hits = [r_precision(images, texts, CAPTIONS[:5], wrong=3, seed=i).value for i in range(40)]
    assert np.mean(hits) == pytest.approx(0.25, abs=0.1)


def test_diversity_is_a_mean_over_prompts():
    images = np.array([0.0, 1.0, 3.0, 10.0, 20.0, 99.0])[:, None]
    prompts = ["a", "a", "b", "a", "b", "alone"]

    def distance(a, b):
        return np.abs(a - b)[:, 0]

    found = diversity(images, prompts, distance)  # a: 1, 10, 9; b: 17
    assert found == pytest.approx((np.mean([20 / 3, 17]), (17 - 20 / 3) / 2))
    many = np.arange(40.0)[:, None]
    assert diversity(many, ["one"] * 40, distance).value == pytest.approx(41 / 3)  # over several batches
    with pytest.raises(UserError, match="at least two pictures of a prompt"):
        diversity(images, range(6), distance)
