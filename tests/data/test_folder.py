import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffjax.data.decode import Limits
from diffjax.data.folder import load_folder
from diffjax.data.loader import make_loader
from diffjax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """An empty folder for pictures, with something outside of it."""
    picture(tmp_path / "outside.png", 99)
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def picture(path, red=0, size=(9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)


def load(folder, **options):
    return load_folder(folder.parent / "cache", folder=folder, **{"resolution": 4} | options)


def reds(source):
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_subfolders_are_classes(folder):
    for red, name in enumerate(["n02/b.png", "n01/x/deep.png", "n10/a.PNG", "n02/a.bmp"]):
        picture(folder / name, red)
    source = load(folder)
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
    assert load(folder).classes == ["cat", "dog", "eel"]
    val = load(folder, split="val")
    assert (val.classes, val.labels, val.captions, reds(val)) == (["cat", "dog", "eel"], [2], ["eel"], [3])
    with pytest.raises(UserError, match=r"no split 'test'.*: train, val"):
        load(folder, split="test")
    picture(folder / "val/fox/1.png")
    with pytest.raises(UserError, match=r"class fox .* not in the split 'train'"):
        load(folder, split="val")


@pytest.mark.parametrize("split", ["", ".", "..", "../pictures", "/tmp", "a/b"])
def test_a_split_is_one_name(folder, split):
    with pytest.raises(UserError, match="name of a sub-folder"):
        load(folder, split=split)


def test_a_class_whose_pictures_are_refused_still_counts(folder):
    picture(folder / "b/1.png")
    (folder / "a").mkdir()
    (folder / "a" / "1.png").write_bytes(b"")
    assert load(folder).labels == [1]


def test_captions_beside_the_pictures(folder):
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        picture(folder / name)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf an apple\n")
    (folder / "sub/b.txt").write_bytes("a caf\u00e9, ".encode() + b"\xe9")
    lines = []
    source = load(folder, log=lines.append)
    assert source.captions == ["an apple", "", "a caf\u00e9, \ufffd"]
    assert source.concepts == source.captions
    assert not source.labels
    assert not source.classes
    assert lines == ["1 files are without a caption:", "  c.webp"]
    (folder / "a.txt").write_bytes(b"a" * 2**17)
    with pytest.raises(UserError, match=r"a\.txt has more than"):
        load(folder)


def test_metadata_jsonl(folder):
    for red, name in enumerate(["b.png", "sub/a.png", "unlisted.png", "c.png"]):
        picture(folder / name, red)
    (folder / "b.txt").write_text("not this")
    rows = [("sub/a.png", " hello\n"), ("b.png", None), ("gone.png", "?"), ("./c.png", "\ud800x")]
    write_jsonl(folder / "metadata.jsonl", *({"file_name": name, "text": text} for name, text in rows))
    lines = []
    source = load(folder, log=lines.append)
    assert source.keys == ["b.png", "c.png", "sub/a.png"]
    assert source.captions == ["", "?x", "hello"]
    assert reds(source) == [0, 3, 1]
    assert lines[0].startswith("1 files are not found")
    assert lines[1:] == ["  gone.png", "1 pictures are left out: metadata.jsonl does not list them."]


def test_metadata_csv(folder):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    text = '\ufefffile_name,size,caption\nb.png,3,"red, or\nblue"\na.png,4,\n'
    (folder / "metadata.csv").write_bytes(text.encode())
    assert load(folder).captions == ["", "red, or\nblue"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "../outside.png", "text": "x"}', "outside of its folder"),
        (b'{"file_name": "a/../../outside.png", "text": "x"}', "outside of its folder"),
        (b'{"file_name": "/etc/passwd", "text": "x"}', "outside of its folder"),
        (b'{"file_name": "a.png", "text": "again"}', "a second time"),
        (b'{"file_name": "./a.png", "text": "again"}', "a second time"),
        (b'{"file_name": "b.png"}', "needs texts"),
        (b'{"file_name": "b.png", "text": 3}', "needs texts"),
        (b'{"text": "b.png"}', "needs texts"),
        (b'["a.png", "x"]', "not a JSON object"),
        (b'{"file_name": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * 2**20 + b"{}", "more than 1048576 bytes"),
    ],
)
def test_metadata_that_is_wrong(folder, line, message):
    picture(folder / "a.png")
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "x"}\n\n' + line)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "Line 3 of" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [("a.png,x,y\n", "needs texts"), ('a.png,"' + "x" * 200_000, "not valid CSV"), ("../a.png,x", "outside")],
)
def test_csv_that_is_wrong(folder, rows, message):
    picture(folder / "a.png")
    header = "file_name,size\n" if message == "needs texts" else "file_name,text\n"
    (folder / "metadata.csv").write_text(header + rows)
    with pytest.raises(UserError, match=f"Line .*{message}"):
        load(folder)


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
    source = load(folder, log=lines.append)
    assert reds(source) == [1, 2]
    assert lines[:2] == ["2 files are left out:", "  out.png: a link to another place"]
    with pytest.raises(UserError, match=r"'val' .* a link to another place"):
        load(folder, split="val")
    write_jsonl(folder / "outside.jsonl", {"file_name": "a.png", "text": "x"})
    (folder / "outside.jsonl").rename(folder.parent / "outside.jsonl")
    (folder / "train/metadata.jsonl").symlink_to(folder.parent / "outside.jsonl")
    assert load(folder).captions == ["", ""]


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
    source = load(folder, log=lines.append)
    assert source.keys == ["good.png"]
    assert lines == [
        "5 files are left out:",
        "  broken.gif: not a regular file",
        "  empty.png: the file is empty",
        "  page.jpg: not a PNG, JPEG, WebP, GIF, BMP or TIFF file",
        "  pipe.png: not a regular file",
        "  wide.png: the picture is too long and narrow (200x10 pixels)",
        f"The pictures of {folder} have no captions.",
    ]
    assert load(folder, limits=Limits(max_aspect=20)).keys == ["good.png", "wide.png"]
    with pytest.raises(UserError, match="no pictures"):
        load(folder, limits=Limits(max_bytes=10))


def test_a_long_list_is_cut(folder):
    picture(folder / "good.png")
    for i in range(25):
        (folder / f"{i:02d}.png").write_bytes(b"")
    lines = []
    load(folder, log=lines.append)
    assert len(lines) == 13
    assert lines[-2:] == ["  and 15 more", f"The pictures of {folder} have no captions."]


def test_a_picture_that_fails_later_is_an_error_that_names_it(folder):
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name, 7, size=(200, 200))
    data = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    source = load(folder)
    assert source.keys == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match=r"b\.png .* truncated or damaged"):
        source[1]
    assert source[2].key == "c.png"
    (folder / "c.png").unlink()
    with pytest.raises(UserError, match=r"c\.png .* No such file"):
        source[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_a_terminal_would_obey(folder):
    picture(folder / "good.png")
    os.rename(folder / "good.png", os.fsencode(folder) + b"/\xff\x1b[2J.png")
    source = load(folder)
    assert source.keys == ["\\udcff\\x1b[2J.png"]
    assert source[0].image.shape == (4, 4, 3)


def test_folders_that_are_not_there(folder):
    with pytest.raises(UserError, match="no pictures"):
        load(folder)
    with pytest.raises(UserError, match="no folder"):
        load(folder / "gone")
    with pytest.raises(UserError, match="resolution"):
        load(folder, resolution=0)


def test_the_background_is_seen(folder):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "a.png")
    assert reds(load(folder)) == [255]
    assert reds(load(folder, background=(3, 2, 1))) == [3]


def test_batches(folder):
    for i in range(6):
        picture(folder / f"{i % 2}/{i}.png", 10 * i)
    source = load(folder)
    batches = make_loader(source, batch_size=3, seed=0, num_epochs=1)
    seen = Counter()
    for batch in batches:
        for index, image in zip(batch["index"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, source[index].image)
            seen[int(index)] += 1
    assert seen == Counter(range(6))
