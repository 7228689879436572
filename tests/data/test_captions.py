import os

import pytest
from pictures import load_small, picture, reds, write_jsonl

from diffjax.errors import UserError


def test_captions_beside_the_pictures(folder):
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        picture(folder / name)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf an apple\n")
    (folder / "sub/b.txt").write_bytes("a caf\u00e9, ".encode() + b"\xe9")
    lines = []
    source = load_small(folder, log=lines.append)
    assert source.captions == ["an apple", "", "a caf\u00e9, \ufffd"]
    assert source.concepts == source.captions
    assert not source.labels
    assert not source.classes
    assert lines == ["1 files are without a caption:", "  c.webp"]
    (folder / "a.txt").write_bytes(b"a" * 2**17)
    (folder / "c.txt").write_bytes("a cat".encode("utf-16"))
    os.mkfifo(folder / "d.txt")
    picture(folder / "d.png")
    source = load_small(folder)
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
    source = load_small(folder, log=lines.append)
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
    assert load_small(folder).captions == ["", "red, or\nblue"]


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
    source = load_small(folder)
    assert source.keys == ["a.png", "c.png"]
    assert source.captions == ["a.png x", "c.png x"]
    [(key, reason)] = source.rejected
    assert message in reason
    assert key in ("metadata.jsonl:3", "a.png", "b.png")
    table.write_bytes(line + b"\n" + line)
    if b"again" not in line:
        with pytest.raises(UserError, match=f"No line of .*{message}"):
            load_small(folder)


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
    source = load_small(folder)
    assert source.keys == ["a.png", "c.png"]
    [(_, reason)] = source.rejected
    assert message in reason


def test_a_csv_without_captions_is_refused(folder):
    picture(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,size\na.png,3\n")
    with pytest.raises(UserError, match=r"No line of .*metadata\.csv:2: .*needs 'file_name'"):
        load_small(folder)


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
    source = load_small(folder)
    assert source.captions == ([caption, ""] if caption is not None else [""])
    assert len(source.rejected) == (caption is None)
