import numpy as np
import pytest

from diffjax.data.transforms import downsample, random_crop, random_flip, resize
from diffjax.errors import UserError


def test_downsample_is_the_mean_of_boxes():
    image = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    small = downsample(image, 4)
    assert small.shape == (3, 2, 3)
    assert small.dtype == np.uint8
    for row in range(3):
        for column in range(2):
            box = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(float)
            np.testing.assert_array_equal(small[row, column], np.rint(box.mean(axis=(0, 1))))


def test_downsample_takes_batches_and_keeps_constants():
    images = np.full((2, 8, 8, 3), 255, np.uint8)
    np.testing.assert_array_equal(downsample(images, 8), np.full((2, 1, 1, 3), 255))
    np.testing.assert_array_equal(downsample(images, 1), images)
    with pytest.raises(ValueError, match="8x8"):
        downsample(images, 3)


def test_resize_changes_the_image_alone():
    element = {"image": np.zeros((64, 64, 3), np.uint8), "index": 7}
    resized = resize(64, 16)(element)
    assert resized["image"].shape == (16, 16, 3)
    assert resized["index"] == 7
    assert element["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(("stored", "wanted"), [(64, 48), (64, 128), (64, 0), (64, -64)])
def test_resize_to_no_whole_fraction(stored, wanted):
    with pytest.raises(UserError, match=f"{stored} px .* {wanted} px"):
        resize(stored, wanted)


def test_random_crop_reaches_every_place_and_no_other():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(200):
        crop = random_crop(3).random_map({"image": image}, rng)["image"]
        assert crop.shape == (3, 3, 3)
        corners.add(int(crop[0, 0, 0]))
    assert corners == {0, 1, 4, 5}


def test_random_crop_of_a_picture_too_small():
    with pytest.raises(UserError, match="4x4"):
        random_crop(5).random_map({"image": np.zeros((4, 4, 3))}, np.random.default_rng(0))


def test_random_flip_mirrors_half_of_the_pictures_left_to_right():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    mirrored = np.array([[image[row, 3 - column] for column in range(4)] for row in range(2)])
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        element = random_flip().random_map({"image": image, "index": 7}, rng)
        assert element["index"] == 7
        same = (element["image"] == image).all()
        assert same or (element["image"] == mirrored).all()
        flipped += not same
    assert 160 < flipped < 240


def test_random_flip_depends_on_the_generator_alone():
    def flips(seed):
        rng = np.random.default_rng(seed)
        image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
        return [int(random_flip().random_map({"image": image}, rng)["image"][0, 0, 0]) for _ in range(50)]

    assert flips(1) == flips(1) != flips(2)
