"""Duplicates: against definitions written out, and all pairs compared."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from diffjax.data.duplicates import confirmed, dhash, near_groups, same_groups
from diffjax.data.source import Example


def linked(hashes, distance):
    """Groups by comparing every pair, again and again until nothing changes."""
    group = list(range(len(hashes)))
    for _ in hashes:
        for i, j in itertools.combinations(range(len(hashes)), 2):
            if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance:
                group[i] = group[j] = min(group[i], group[j])
    found = [[i for i, other in enumerate(group) if other == first] for first in sorted(set(group))]
    return [places for places in found if len(places) > 1]


@pytest.mark.parametrize("distance", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_all_pairs(distance, seed):
    random = np.random.default_rng(seed)
    # Around few centres, with 0 to 4 bits changed anywhere, so that every choice of parts is needed.
    hashes = random.integers(0, 2**64, 6, dtype=np.uint64)[random.integers(0, 6, 60)]
    for i in range(len(hashes)):
        for bit in random.choice(64, random.integers(0, 5), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    expected = linked(hashes, distance)
    assert near_groups(hashes, distance=distance) == expected
    assert len(expected) > 2


def test_no_pictures_have_no_groups():
    assert near_groups(np.zeros(0, np.uint64)) == []
    assert near_groups(np.array([5], np.uint64)) == []
    assert near_groups(np.zeros(3, np.uint64)) == [[0, 1, 2]]


def test_same_groups():
    digests = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2]], np.uint8)
    assert same_groups(digests) == [[0, 2, 5], [1, 4]]


def test_the_hash_is_where_grey_gets_lighter():
    random = np.random.default_rng(0)
    boxes = random.integers(0, 2, (8, 9)) * 100
    image = np.repeat(boxes.repeat(4, axis=0).repeat(4, axis=1)[:, :, None], 3, axis=2).astype(np.uint8)
    bits = "".join(str(int(row[j + 1] > row[j])) for row in boxes.tolist() for j in range(8))
    assert dhash(image) == int(bits, 2)
    slope = np.broadcast_to(np.arange(72, dtype=np.uint8)[None, :, None], (64, 72, 3))
    assert dhash(np.ascontiguousarray(slope)) == 2**64 - 1
    for step, expected in ((4, 0), (5, 0x5555555555555555)):  # a few levels are nothing
        stripes = np.tile(
            np.array([100, 100, 100 + step, 100, 100 + step, 100, 100 + step, 100, 100 + step]), 8
        )
        grey = stripes.reshape(8, 9, 1).repeat(4, axis=0).repeat(4, axis=1).repeat(3, axis=2)
        assert dhash(grey.astype(np.uint8)) == expected


class Pictures:
    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return Example(self.images[i], "", "", "", "")


def photo(seed):
    """Smooth and coloured, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


def saved(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_copies_that_were_saved_or_scaled_anew_are_found():
    images = [photo(seed) for seed in range(20)]
    small = Image.fromarray(images[2]).resize((40, 40), Image.Resampling.BICUBIC).resize((64, 64))
    images += [saved(images[0], 60), saved(images[1], 90), np.asarray(small), images[3]]
    found = near_groups(np.array([dhash(image) for image in images], np.uint64))
    assert confirmed(Pictures(images), found) == [[0, 20], [1, 21], [2, 22], [3, 23]]


def test_colours_tell_pictures_of_one_shape_apart():
    red = np.zeros((16, 16, 3), np.uint8)
    red[4:12, 4:12, 0] = 250
    blue = red[:, :, ::-1]
    images = [red, blue, red, np.zeros_like(red), blue]
    assert confirmed(Pictures(images), [[0, 1, 2, 3, 4]]) == [[0, 2], [1, 4]]
