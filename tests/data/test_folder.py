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
from diffjax.data.source import BadExample
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
    (folder / "c.txt").write_bytes("a cat".encode("utf-16"))
    os.mkfifo(folder / "d.txt")
    picture(folder / "d.png")
    source = load(folder)
    assert source.keys == ["sub/b.jpg"]
    assert source.rejected == [
        ("a.png", "the caption has more than 65536 bytes"),
        ("c.webp", "the caption is not text"),
        ("d.png", "the caption is not a regular file"),
    ]


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
        (b'{"file_name": "a.png", "text": "again"}', "names it twice"),
        (b'{"file_name": "./a.png", "text": "again"}', "names it twice"),
        (b'{"file_name": "b.png"}', "needs 'file_name'"),
        (b'{"file_name": "b.png", "text": 3}', "not text"),
        (b'{"file_name": "b.png", "text": "a\\u0000b"}', "not text"),
        (b'{"file_name": "b.png", "text": "' + b"x" * 2**17 + b'"}', "more than 65536 bytes"),
        (b'{"text": "b.png"}', "needs 'file_name'"),
        (b'["a.png", "x"]', "not a JSON object"),
        (b'{"file_name": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * 2**22 + b"{}", "more than 1048576 bytes"),
    ],
)
def test_a_line_of_a_table_that_is_wrong_is_left_out(folder, line, message):
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name)
    table = folder / "metadata.jsonl"
    good = [f'{{"file_name": "{name}", "text": "{name} x"}}'.encode() for name in ("a.png", "c.png")]
    table.write_bytes(b"\n".join([good[0], b"", line, good[1]]))
    source = load(folder)
    assert source.keys == ["a.png", "c.png"]
    assert source.captions == ["a.png x", "c.png x"]
    [(key, reason)] = source.rejected
    assert message in reason
    assert key in ("metadata.jsonl:3", "a.png", "b.png")
    table.write_bytes(line + b"\n" + line)
    if b"again" not in line:
        with pytest.raises(UserError, match=f"No line of .*{message}"):
            load(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('b.png,"' + "x" * 200_000 + '"\n', "not valid CSV"),
        ("b.png," + "x" * 2**21 + "\n", "more than 1048576"),
        ("b.png," + "x" * 2**16 + "x\n", "more than 65536"),
        ("b.png,a\0b\n", "not text"),
        ("../a.png,x\n", "outside"),
    ],
)
def test_a_row_of_a_csv_that_is_wrong_is_left_out(folder, row, message):
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name)
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n" + row + "c.png,y\n")
    source = load(folder)
    assert source.keys == ["a.png", "c.png"]
    [(_, reason)] = source.rejected
    assert message in reason


def test_a_csv_without_captions_is_refused(folder):
    picture(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,size\na.png,3\n")
    with pytest.raises(UserError, match=r"No line of .*metadata\.csv:2: .*needs 'file_name'"):
        load(folder)


RTL = "\u05d7\u05ea\u05d5\u05dc \u200fcat\u202e \u0642\u0637\u0629"


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        (b"", ""),
        (b" \n\t", ""),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        (b"caf\xe9", "caf\ufffd"),
        (b"two\nlines", "two\nlines"),
        (b"x" * 2**16, "x" * 2**16),
        (b"x" * (2**16 + 1), None),
        (b"x" * 2**20, None),
        (b"a\0b", None),
        (RTL.encode(), RTL),
    ],
)
def test_captions_that_are_unusual(folder, written, caption):
    picture(folder / "a.png")
    picture(folder / "b.png")
    (folder / "a.txt").write_bytes(written)
    source = load(folder)
    assert source.captions == ([caption, ""] if caption is not None else [""])
    assert len(source.rejected) == (caption is None)


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
        "  page.jpg: the file is a web page, not a picture",
        "  pipe.png: not a regular file",
        "  wide.png: the picture is too long and narrow (200x10 pixels)",
        f"The pictures of {folder} have no captions.",
    ]
    assert source.rejected[-1] == ("wide.png", "the picture is too long and narrow")
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


def test_animations_are_left_out_where_that_is_asked_for(folder):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    picture(folder / "b.png", 7)
    assert reds(load(folder)) == [255, 7]
    source = load(folder, animated="reject")
    assert source.keys == ["b.png"]
    assert source.rejected == [("a.gif", "the picture is animated, or has several pages")]
    with pytest.raises(UserError, match=r"data\.animated"):
        load(folder, animated="last")


def test_the_name_of_a_file_does_not_say_what_it_is(folder):
    picture(folder / "a.png", 50)
    (folder / "a.png").rename(folder / "a.JPG")
    source = load(folder)
    assert reds(source) == [50]
    assert source.size(0) == (9, 9)
    stamps = source.stamps
    os.utime(folder / "a.JPG", ns=(1, 1))
    assert load(folder).stamps != stamps
    assert source.read(0) == (folder / "a.JPG").read_bytes()


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
