import os
import sys
from collections import Counter

import numpy as np
import pytest
from pictures import load_small, picture, reds, write_jsonl
from PIL import Image

from diffjax.data.decode import Limits
from diffjax.data.loader import make_loader
from diffjax.data.source import BadExample
from diffjax.errors import UserError


def test_subfolders_are_classes(folder):
    for red, name in enumerate(["n02/b.png", "n01/x/deep.png", "n10/a.PNG", "n02/a.bmp"]):
        picture(folder / name, red)
    source = load_small(folder)
    assert source.keys == ["n01/x/deep.png", "n02/a.bmp", "n02/b.png", "n10/a.PNG"]
    assert reds(source) == [1, 3, 0, 2]
    assert source.classes == ["n01", "n02", "n10"]
    assert source.labels == [0, 1, 1, 2]
    assert source.captions == source.concepts == ["n01", "n02", "n02", "n10"]
    assert source.styles == [""] * 4
    assert source[1][1:] == ("n02", "n02/a.bmp", "n02", "")
    assert (source.name, source.resolution, len(source)) == ("pictures-train", 4, 4)
    assert source[0].image.shape == (4, 4, 3)
    with pytest.raises(IndexError):
        source[4]


def test_splits_share_the_classes_of_train(folder):
    for red, name in enumerate(["train/cat/1.png", "train/dog/1.png", "train/eel/1.png", "val/eel/2.png"]):
        picture(folder / name, red)
    assert load_small(folder).classes == ["cat", "dog", "eel"]
    val = load_small(folder, split="val")
    assert (val.classes, val.labels, val.captions, reds(val)) == (["cat", "dog", "eel"], [2], ["eel"], [3])
    with pytest.raises(UserError, match=r"no split 'test'.*: train, val"):
        load_small(folder, split="test")
    picture(folder / "val/fox/1.png")
    with pytest.raises(UserError, match=r"class fox .* not in the split 'train'"):
        load_small(folder, split="val")


@pytest.mark.parametrize("split", ["", ".", "..", "../pictures", "/tmp", "a/b"])
def test_a_split_is_one_name(folder, split):
    with pytest.raises(UserError, match="name of a sub-folder"):
        load_small(folder, split=split)


def test_a_class_whose_pictures_are_refused_still_counts(folder):
    picture(folder / "b/1.png")
    (folder / "a").mkdir()
    (folder / "a" / "1.png").write_bytes(b"")
    assert load_small(folder).labels == [1]


def test_links_are_followed_within_the_folder_alone(folder):
    picture(folder / "train/a.png", 1)
    picture(folder / "pool/b.png", 2)
    (folder / "train/b.png").symlink_to("../pool/b.png")
    (folder / "train/out.png").symlink_to(folder.parent / "outside.png")
    (folder / "train/out.txt").symlink_to(folder.parent / "outside.png")
    (folder / "train/loop").symlink_to(folder / "train")
    (folder / "train/up").symlink_to(folder.parent)
    (folder / "val").symlink_to(folder.parent)
    lines = []
    source = load_small(folder, log=lines.append)
    assert reds(source) == [1, 2]
    assert lines[:2] == ["2 files are left out:", "  out.png: a link to another place"]
    with pytest.raises(UserError, match=r"'val' .* a link to another place"):
        load_small(folder, split="val")
    write_jsonl(folder / "outside.jsonl", {"file_name": "a.png", "text": "x"})
    (folder / "outside.jsonl").rename(folder.parent / "outside.jsonl")
    (folder / "train/metadata.jsonl").symlink_to(folder.parent / "outside.jsonl")
    assert load_small(folder).captions == ["", ""]


def test_files_that_are_no_pictures_are_named(folder):
    picture(folder / "good.png", 5)
    picture(folder / "wide.png", size=(200, 10))
    picture(folder / ".hidden/a.png")
    picture(folder / ".a.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "notes.md").write_text("not counted")
    (folder / "dir.png").mkdir()
    (folder / "broken.gif").symlink_to(folder / "nowhere.gif")
    os.mkfifo(folder / "pipe.png")
    lines = []
    source = load_small(folder, log=lines.append)
    assert source.keys == ["good.png"]
    assert lines == [
        "5 files are left out:",
        "  broken.gif: not a regular file",
        "  empty.png: the file is empty",
        "  page.jpg: the file is a web page, not a picture",
        "  pipe.png: not a regular file",
        "  wide.png: the picture is too long and narrow (200x10 pixels)",
        f"The pictures of {folder} have no captions.",
    ]
    assert source.rejected[-1] == ("wide.png", "the picture is too long and narrow")
    assert load_small(folder, limits=Limits(max_aspect=20)).keys == ["good.png", "wide.png"]
    with pytest.raises(UserError, match="no pictures"):
        load_small(folder, limits=Limits(max_bytes=10))


def test_a_long_list_is_cut(folder):
    picture(folder / "good.png")
    for i in range(25):
        (folder / f"{i:02d}.png").write_bytes(b"")
    lines = []
    load_small(folder, log=lines.append)
    assert len(lines) == 13
    assert lines[-2:] == ["  and 15 more", f"The pictures of {folder} have no captions."]


def test_a_picture_that_fails_later_is_an_error_that_names_it(folder):
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name, 7, size=(200, 200))
    data = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    source = load_small(folder)
    assert source.keys == ["a.png", "b.png", "c.png"]
    with pytest.raises(BadExample, match=r"b\.png: .* truncated or damaged") as error:
        source[1]
    assert (error.value.key, error.value.reason) == ("b.png", "the file is truncated or damaged")
    assert source[2].key == "c.png"
    (folder / "c.png").unlink()
    with pytest.raises(BadExample, match=r"c\.png: .* No such file"):
        source[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_a_terminal_would_obey(folder):
    picture(folder / "good.png")
    os.rename(folder / "good.png", os.fsencode(folder) + b"/\xff\x1b[2J.png")
    source = load_small(folder)
    assert source.keys == ["\\udcff\\x1b[2J.png"]
    assert source[0].image.shape == (4, 4, 3)


def test_folders_that_are_not_there(folder):
    with pytest.raises(UserError, match="no pictures"):
        load_small(folder)
    with pytest.raises(UserError, match="no folder"):
        load_small(folder / "gone")
    with pytest.raises(UserError, match="resolution"):
        load_small(folder, resolution=0)


def test_the_background_is_seen(folder):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "a.png")
    assert reds(load_small(folder)) == [255]
    assert reds(load_small(folder, background=(3, 2, 1))) == [3]


def test_animations_are_left_out_where_that_is_asked_for(folder):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    picture(folder / "b.png", 7)
    assert reds(load_small(folder)) == [255, 7]
    source = load_small(folder, animated="reject")
    assert source.keys == ["b.png"]
    assert source.rejected == [("a.gif", "the picture is animated, or has several pages")]
    with pytest.raises(UserError, match=r"data\.animated"):
        load_small(folder, animated="last")


def test_the_name_of_a_file_does_not_say_what_it_is(folder):
    picture(folder / "a.png", 50)
    (folder / "a.png").rename(folder / "a.JPG")
    source = load_small(folder)
    assert reds(source) == [50]
    assert source.size(0) == (9, 9)
    stamps = source.stamps
    os.utime(folder / "a.JPG", ns=(1, 1))
    assert load_small(folder).stamps != stamps
    assert source.read(0) == (folder / "a.JPG").read_bytes()


def test_batches(folder):
    for i in range(6):
        picture(folder / f"{i % 2}/{i}.png", 10 * i)
    source = load_small(folder)
    batches = make_loader(source, batch_size=3, seed=0, num_epochs=1)
    seen = Counter()
    for batch in batches:
        for index, image in zip(batch["index"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, source[index].image)
            seen[int(index)] += 1
    assert seen == Counter(range(6))
