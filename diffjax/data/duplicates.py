"""Pictures that are in a data set more than once: the same pixels, or nearly the same to the eye."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from diffjax.data.source import Source

NEAR = 2
"""Of the 64 bits of `dhash`, at most so many differ between pictures that look alike."""

_STEP = 4  # levels of 255

# Of pictures that look alike, the means of 16 x 16 boxes differ by so much of 255 on average. JPEG of quality
# 50 makes up to 5 of them (measured on emoji).
_SIDE, _LEVELS = 16, 6.0

# If two bits differ, at least three of five parts are the same: pictures are compared with those alone that
# share such three, about 39 bits.
_PARTS = (13, 13, 13, 13, 12)


def dhash(image: np.ndarray) -> int:
    """The difference hash of a picture, 64 bits: where grey of 9 x 8 boxes gets lighter from left to right.

    After Krawetz (2013), "Kind of like that"; but a step of a few levels is none. Of drawings, much of
    which is flat, saved as JPEG of quality 50, 98 % then stay within `NEAR`, without this 36 % (measured on
    emoji).

    Args:
      image: `[height, width, 3]` uint8.
    """
    grey = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1] + _STEP).tobytes(), "big")


def same_groups(digests: np.ndarray) -> list[list[int]]:
    """Places of equal digests, of each that is there more than once; `[n, bytes]` uint8."""
    places = defaultdict(list)
    for i, digest in enumerate(digests):
        places[digest.tobytes()].append(i)
    return [group for group in places.values() if len(group) > 1]


def near_groups(hashes: np.ndarray, *, distance: int = NEAR) -> list[list[int]]:
    """Places of pictures that are linked by hashes of which at most `distance` bits differ.

    Args:
      hashes: `[n]` uint64, see `dhash`.
      distance: how many; 0 to 2.

    Returns:
      the groups of two or more, each in ascending order, by their first.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 <= distance <= 2:
        raise ValueError(f"distance {distance}; expected 0, 1 or 2")
    unique, which = np.unique(hashes, return_inverse=True)
    pairs = np.concatenate([_pairs(unique, mask, distance) for mask in _masks()])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (len(unique),) * 2)
    labels = connected_components(graph, directed=False)[1][which]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1)


def confirmed(source: Source, groups: Sequence[Sequence[int]], *, num_threads: int = 4) -> list[list[int]]:
    """Those parts of groups, of two pictures or more, whose colours are nearly the same everywhere.

    A hash knows nothing of colours, and little of flat drawings.

    Args:
      source: the pictures.
      groups: places of pictures that may look alike.
      num_threads: how many are decoded at a time.
    """

    def small(i: int) -> np.ndarray:
        image = Image.fromarray(source[i].image)
        return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.int16)

    parts: list[list[int]] = []
    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for group in groups:
            first = len(parts)
            leaders: list[np.ndarray] = []
            for i, picture in zip(group, pool.map(small, group), strict=True):
                differences = [np.abs(leader - picture).mean() for leader in leaders]
                nearest = int(np.argmin(differences)) if leaders else 0
                if leaders and differences[nearest] <= _LEVELS:
                    parts[first + nearest].append(i)
                else:
                    parts.append([i])
                    leaders.append(picture)
    return [part for part in parts if len(part) > 1]


def _masks() -> list[np.uint64]:
    """Every choice of three of the five parts."""
    starts = itertools.accumulate(_PARTS, initial=0)
    parts = [((1 << size) - 1) << start for start, size in zip(starts, _PARTS, strict=False)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(parts, 3)]


def _pairs(hashes: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Places of hashes that are equal under the mask, and differ in few bits: `[pairs, 2]`."""
    order = np.argsort(hashes & mask, kind="stable")
    parts = (hashes & mask)[order]
    found = [np.empty((0, 2), np.int64)]
    first = np.arange(len(order))
    for step in itertools.count(1):  # neighbours, then those two apart, as long as they are of one run
        first = first[first < len(order) - step]
        first = first[parts[first] == parts[first + step]]
        if not len(first):
            return np.concatenate(found)
        one, other = order[first], order[first + step]
        near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
        found.append(np.stack([one[near], other[near]], axis=1))
    raise AssertionError
