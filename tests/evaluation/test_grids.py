import numpy as np
import pytest
from PIL import Image

from diffjax.errors import UserError
from diffjax.evaluation.grids import enlarge, grid, sheet, square_grid, write_png


def picture(value, side=8):
    return np.full((side, side, 3), value, np.uint8)


def test_a_png_keeps_its_pixels_and_says_how_it_was_made(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    metadata = {"prompt": "a naïve façade — 猫 👩‍🚀", "seed": "7", "config": '{"a": 1}\n' * 500}
    path = tmp_path / "new" / "folder" / "image.png"
    write_png(path, image, metadata)
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read), image)
        assert read.text == metadata
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]  # nothing temporary is left


def test_a_png_needs_no_metadata_and_survives_a_null_character(tmp_path):
    write_png(tmp_path / "a.png", picture(3))
    write_png(tmp_path / "b.png", picture(3), {"prompt": "cat\0dog"})
    with Image.open(tmp_path / "b.png") as read:
        assert read.text == {"prompt": "catdog"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    write_png(path, picture(1))
    before = path.read_bytes()

    def fail(self, target, **kwargs):
        target.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*image\.png: No space left on device"):
        write_png(path, picture(2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]


def test_a_folder_that_is_a_file_is_an_error_for_people(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "taken" / "image.png", picture(1))


def test_enlarging_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = enlarge(image, 5)
    assert large.shape == (6, 6, 3)
    np.testing.assert_array_equal(large[::3, ::3], image)
    np.testing.assert_array_equal(large[2, 2], image[0, 0])
    np.testing.assert_array_equal(enlarge(picture(1), 8), picture(1))
    np.testing.assert_array_equal(enlarge(picture(1), 4), picture(1))


def test_a_grid_puts_images_in_reading_order_on_white():
    canvas = grid([[picture(10), picture(20)], [picture(30)]])
    assert canvas.shape == (2 * 12 + 4, 2 * 12 + 4, 3)
    assert canvas.dtype == np.uint8
    assert [canvas[8, 8, 0], canvas[8, 20, 0], canvas[20, 8, 0], canvas[20, 20, 0]] == [10, 20, 30, 255]
    assert (canvas == 10).sum() == (canvas == 20).sum() == (canvas == 30).sum() == 8 * 8 * 3


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(9, None, (3, 3)), (5, None, (3, 2)), (5, 4, (2, 4)), (1, None, (1, 1))]
)
def test_a_square_grid_breaks_its_rows(count, columns, shape):
    canvas = square_grid([picture(i + 1) for i in range(count)], columns)
    assert canvas.shape == (shape[0] * 12 + 4, shape[1] * 12 + 4, 3)
    assert {int(v) for v in np.unique(canvas)} == {*range(1, count + 1), 255}


def test_a_sheet_shows_every_image_and_any_caption():
    rows = [("cat " * 200, [picture(10), picture(20, side=4)]), ("猫 naïve 👩‍🚀", [picture(30), picture(40)])]
    canvas = sheet(["real", "a header that is much too long for its column"], rows, side=16)
    assert canvas.dtype == np.uint8
    assert canvas.shape[0] == 18 + 2 * 38 + 4
    tops, lefts = (36, 74), (4, 24)
    for i, (_, images) in enumerate(rows):
        for j, image in enumerate(images):
            cell = canvas[tops[i] : tops[i] + 16, lefts[j] : lefts[j] + 16]
            np.testing.assert_array_equal(cell, picture(int(image[0, 0, 0]), side=16))
    np.testing.assert_array_equal(canvas[:, -4:], 255)  # no text runs over the edge


def test_rows_can_be_folded_into_blocks():
    rows = [(f"row {i}", [picture(10 * i)]) for i in range(3)]
    left, right = (sheet(["real"], part, side=16) for part in (rows[:2], rows[2:]))
    folded = sheet(["real"], rows, side=16, blocks=2)
    np.testing.assert_array_equal(folded[:, : left.shape[1]], left)
    np.testing.assert_array_equal(folded[: right.shape[0] - 4, left.shape[1] :], right[:-4])
    np.testing.assert_array_equal(folded[right.shape[0] :, left.shape[1] :], 255)


def test_captions_leave_their_marks():
    blank = sheet([""], [("", [picture(255)])], side=64)
    assert (sheet(["real"], [("", [picture(255)])], side=64) != blank).any()
    assert (sheet([""], [("cat", [picture(255)])], side=64) != blank).any()
