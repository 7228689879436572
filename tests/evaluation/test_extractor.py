"""Batches, meshes and remainders change nothing of what a network gives; here the network is a matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_weights import random_pictures

from diffjax.evaluation.features import Extractor, PairDistance
from diffjax.evaluation.prepare import cropped, unchanged, unrounded, whole
from diffjax.parallel.mesh import make_mesh

MATRIX = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
COMPILED = []


def apply(params, images):
    COMPILED.append(images.shape)
    features = images.astype(jnp.float32).mean(axis=(1, 2)) @ params["matrix"]
    return features, 2 * features[:, :4]


def extractor(**changes):
    plain = Extractor("Matrix", "FD-Matrix", 5, 4, unchanged, apply, {"matrix": MATRIX}, batch_size=3)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("mesh", [None, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_features_do_not_depend_on_batches_and_meshes(count, mesh):
    images = random_pictures(20, 8, 12)[:count]
    found = extractor(mesh=mesh and make_mesh(**mesh))(images)
    expected = images.mean(axis=(1, 2), dtype=np.float64) @ MATRIX
    np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-3)
    assert np.array_equal(found.logits, 2 * found.features[:, :4])
    assert found.features.dtype == np.float32


def test_it_is_compiled_once_and_divided_over_the_devices():
    several = extractor(mesh=make_mesh(), batch_size=3)
    COMPILED.clear()
    for count in (20, 3, 5):
        several(random_pictures(count, 8, 8))
    assert COMPILED == [(8, 8, 8, 3)]
    spread = jax.tree.leaves(several._batches._placed)[0].sharding
    assert len(spread.device_set) == 8


def test_without_logits():
    features, logits = extractor(classes=0, apply=lambda p, x: (apply(p, x)[0], None))(
        random_pictures(2, 4, 4)
    )
    assert features.shape == (2, 5)
    assert logits is None


def test_pairs():
    def distance(params, pairs):
        return params * jnp.abs(pairs[..., :3].astype(jnp.float32) - pairs[..., 3:]).mean(axis=(1, 2, 3))

    a, b = random_pictures(10, 6, 6).reshape(2, 5, 6, 6, 3)
    found = PairDistance("L1", distance, np.float32(2), batch_size=2)(a, b)
    np.testing.assert_allclose(found, 2 * np.abs(a - b.astype(float)).mean(axis=(1, 2, 3)), rtol=1e-6)
    with pytest.raises(ValueError, match="expected the same shape"):
        PairDistance("L1", distance, np.float32(2))(a, b[:3])


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1), np.uint8)]
)
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match=r"expected uint8 \[n, h, w, 3\]"):
        extractor()(images)


def test_pictures_are_prepared():
    images = random_pictures(2, 30, 20)
    theirs = Image.fromarray(images[0]).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(whole(8)(images)[0], np.asarray(theirs))
    assert whole(30)(square := random_pictures(1, 30, 30)) is square
    middle = Image.fromarray(images[0]).resize((8, 12), Image.Resampling.BICUBIC).crop((0, 2, 8, 10))
    assert np.array_equal(cropped(8)(images)[0], np.asarray(middle))
    grey = 64 + images // 2  # what is rounded is also cut off at black and white, twice
    close = unrounded(8)(grey)
    assert close.dtype == np.float32
    assert 0 < np.abs(close - whole(8)(grey)).max() < 1.5
    close = unrounded(8)(images)
    assert 0 <= close.min() < close.max() <= 255
