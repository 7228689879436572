import io
import json
import os
import tarfile

import numpy as np
import pytest
from pictures import png
from PIL import Image

from diffjax.data.decode import Limits
from diffjax.data.source import BadExample
from diffjax.data.tar import Damage, list_members
from diffjax.data.webdataset import load_webdataset
from diffjax.errors import UserError


def write(path, *members, file_format=tarfile.PAX_FORMAT):
    """A shard made by Python's own library; a member is (name, content) or a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=file_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def load(path, **options):
    return load_webdataset(path.parent / "cache", **{"folder": path.parent, "resolution": 4} | options)


def shown(source):
    return [(key, caption, int(source[i].image[0, 0, 0])) for i, (key, caption) in enumerate(pairs(source))]


def pairs(source):
    return zip(source.keys, source.captions, strict=True)


def test_examples_are_the_files_of_one_key(tmp_path):
    write(
        tmp_path / "b-1.tar",
        ("x/0.jpg", png(40)),  # the name of a file does not say what it is
        ("x/0.json", b'{"caption": "from JSON", "width": 3}'),
        ("x/1.txt", b" text\n"),
        ("x/1.json", b'{"caption": "not this"}'),
        ("x/1.PNG", png(50)),
    )
    write(
        tmp_path / "b-0.tar", ("a.seg.png", png(1)), ("a.png", png(10)), ("a.cls", b"1\n"), ("._a.png", b"")
    )
    source = load(tmp_path / "b-0.tar")
    assert shown(source) == [("b-0/a", "", 10), ("b-1/x/0", "from JSON", 40), ("b-1/x/1", "text", 50)]
    assert (source.labels, source.rejected, len(source)) == ([], [], 3)
    assert source.read(0) == png(10)
    assert source.size(0) == (9, 9)
    with pytest.raises(BadExample, match="too small"):
        load(tmp_path / "b-0.tar", limits=Limits(min_side=10)).size(0)
    assert load(tmp_path / "b-0.tar", image="seg.png").keys == ["b-0/a"]
    assert load(tmp_path / "b-0.tar", caption="width").rejected[0] == ("b-1/x/0", "the caption is not text")


def test_classes_and_several_captions(tmp_path):
    files = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png(i)), ("cls", b"%d" % (i % 2)))
    ]
    source = load(write(tmp_path / "a.tar", *files))
    assert (source.labels, source.classes, source.captions) == ([0, 1, 0], ["0", "1"], ["0", "1", "0"])
    source = load(write(tmp_path / "d" / "a.tar", ("0.png", png(3)), ("0.json", b'{"text": ["one", "two"]}')))
    assert shown(source) == [("a/0/0", "one", 3), ("a/0/1", "two", 3)]


@pytest.mark.parametrize("file_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names(tmp_path, file_format):
    long = "d" * 70 + "/" + "\u00e9" * 40  # more than the 100 bytes of the oldest headers
    names = ["./0", "caf\u00e9", "a.b/1"] + ([] if file_format == tarfile.USTAR_FORMAT else [long * 3])
    path = write(tmp_path / "a.tar", *((f"{n}.png", png(7)) for n in names), file_format=file_format)
    assert load(path).keys == [f"a/{name.removeprefix('./')}" for name in names]
    with tarfile.open(path) as tar:
        told = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(m.name, m.offset, m.size) for m in list_members(path)] == told


def test_a_size_in_an_extended_header_counts(tmp_path):
    record = f"11 size={len(png(7))}\n".encode()
    extended, info = tarfile.TarInfo("x"), tarfile.TarInfo("0.png")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    blocks = extended.tobuf() + record.ljust(512, b"\0") + info.tobuf() + png(7).ljust(512, b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(blocks + write(tmp_path / "b" / "b.tar", ("1.png", png(8))).read_bytes())
    assert shown(load(path)) == [("a/0", "", 7), ("a/1", "", 8)]
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == [m[:3] for m in list_members(path)]


def test_splits(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "more/x.tar", "more/deep/x.tar", ".hidden.tar"):
        write(tmp_path / name, ("0.png", png(1)))
    assert load(tmp_path / "a").keys == ["train-0/0", "train-1/0"]
    assert load(tmp_path / "a", split="val").keys == ["val-0/0"]
    assert load(tmp_path / "a", split="more").keys == ["deep/x/0", "x/0"]
    for name in ("train-0.tar", "train-1.tar"):
        (tmp_path / name).rename(tmp_path / name.replace("train", "part"))
    assert load(tmp_path / "a").keys == ["part-0/0", "part-1/0"]
    assert load(tmp_path / "a", folder=tmp_path / "*-0.tar").keys == ["part-0/0", "val-0/0"]
    for split in ("test", "mor", "..", "a/b", ""):
        with pytest.raises(UserError, match="split"):
            load(tmp_path / "a", split=split)
    with pytest.raises(UserError, match="no folder"):
        load(tmp_path / "a", folder=tmp_path / "gone")
    (tmp_path / "train-9.tar").symlink_to("part-0.tar")
    assert load(tmp_path / "a").keys == ["train-9/0"]
    write(tmp_path.parent / "outside" / f"{tmp_path.name}.tar", ("0.png", png(1)))
    (tmp_path / "train-8.tar").symlink_to(tmp_path.parent / "outside" / f"{tmp_path.name}.tar")
    with pytest.raises(UserError, match="link to another place"):
        load(tmp_path / "a")


def test_what_is_not_read(tmp_path):
    link, device = tarfile.TarInfo("l.png"), tarfile.TarInfo("d.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    hard = tarfile.TarInfo("h.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "0.png"
    folder = tarfile.TarInfo("dir.png/")
    folder.type = tarfile.DIRTYPE
    evil = [("/abs.png", png(1)), ("../up.png", png(2)), ("a/../../b.png", png(3))]
    pickles = [("0.pyd", b"cos\nsystem\n(S'touch /tmp/x'\ntR."), ("0.pkl", b""), ("0.x.pth", b"")]
    path = write(tmp_path / "a.tar", ("0.png", png(9)), *pickles, link, hard, device, folder, *evil)
    before = sorted(os.listdir(tmp_path))
    lines = []
    source = load(path, log=lines.append)
    assert shown(source) == [("a/0", "", 9)]
    assert [line.split()[:2] for line in lines] == [["a.tar:", "3"]] * 3
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "cache"])


def test_interleaved_and_duplicate_files(tmp_path):
    files = [
        ("0.png", png(10)),
        ("1.png", png(20)),
        ("0.txt", b"zero"),
        ("1.txt", b"one"),
        ("1.PNG", png(99)),
    ]
    lines = []
    source = load(write(tmp_path / "a.tar", *files), log=lines.append)
    assert shown(source) == [("a/0", "zero", 10), ("a/1", "one", 20)]
    assert source.rejected == [("a/1.png", "the name is there twice")]
    assert lines == [
        "a.tar: 2 times the files of one example do not follow one another: they are put together."
    ]


def test_examples_that_are_bad(tmp_path):
    big = json.dumps({"text": "x" * 2**20}).encode()
    files = {
        "a": [("png", png(1)), ("txt", b"x" * 2**20)],
        "b": [("png", png(2)), ("txt", b"a\0b")],
        "c": [("png", png(3)), ("json", b"[" * 100_000)],
        "d": [("png", png(4)), ("json", big)],
        "e": [("txt", b"alone")],
        "f": [("png", b"<html>"), ("txt", b"fine")],
        "g": [("png", png(5)), ("json", b'["no object"]')],
        "h": [("png", b"x" * 5000), ("txt", b"large")],
    }
    path = write(tmp_path / "a.tar", *((f"{k}.{e}", data) for k, v in files.items() for e, data in v))
    source = load(path, limits=Limits(max_bytes=4000))
    assert source.keys == ["a/f", "a/g"]
    assert source.rejected == [
        ("a/a", "the caption has more than 65536 bytes"),
        ("a/b", "the caption is not text"),
        ("a/c", "the JSON is not valid"),
        ("a/d", "the JSON has more than 1048576 bytes"),
        ("a/e", "there is no picture"),
        ("a/h", "the file has too many bytes"),
    ]
    with pytest.raises(BadExample, match="web page"):
        source[0]


def test_an_archive_that_is_cut_off_is_used_up_to_there(tmp_path):
    files = [(f"{i}.{kind}", data) for i in range(5) for kind, data in (("png", png(i)), ("txt", b"word"))]
    whole = write(tmp_path / "a.tar", *files).read_bytes()
    step = 4 * 512  # a header and a block for each of the two files
    for length in sorted([*range(0, len(whole), 100), *range(0, 5 * step, step)][1:]):
        path = tmp_path / f"{length}" / "a.tar"
        path.parent.mkdir()
        path.write_bytes(whole[:length])
        lines = []
        full, rest = divmod(length, step)
        # What is in the middle of an example is not used, nor the one before a file that is cut off.
        kept = full - (0 < rest < 512 + len(png(full)))
        if kept < 1:
            with pytest.raises(UserError, match="no pictures"):
                load(path)
            continue
        source = load(path, log=lines.append)
        if length >= 5 * step + 512:
            assert (len(source), lines) == (5, [])
        elif rest == 0:
            assert (len(source), source.rejected) == (full, [])
            assert f"no end mark; the {full} examples" in lines[0]
        else:
            assert len(source) == kept
            assert source.rejected == [("a", "the archive is damaged or cut off")]
            assert f"the {kept} examples before that are used" in lines[0]
            assert all(caption == "word" for caption in source.captions)


def test_headers_that_lie(tmp_path):
    data = bytearray(write(tmp_path / "a.tar", ("0.png", png(1)), ("1.png", png(2))).read_bytes())

    def header(name, size, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    good = bytes(data[:1024])
    cases = {
        "ends within": header("1.png", 2**40),
        "a size of -": header("1.png", 0)[:124] + b"\xff" * 12 + header("1.png", 0)[136:],
        "a name is too long": header("x", 2**30, tarfile.GNUTYPE_LONGNAME),
        "extended header is damaged": header("x", 20, tarfile.XHDTYPE)
        + b"99 path=/etc/passwd\n".ljust(512, b"\0"),
        "header is damaged": b"\x01" * 512,
    }
    for message, rest in cases.items():
        if message == "a size of -":
            checksum = 256 + sum(rest[:148]) + sum(rest[156:512])
            rest = rest[:148] + b"%06o\0 " % checksum + rest[156:]
        (tmp_path / "b.tar").write_bytes(good + rest)
        members = list_members(tmp_path / "b.tar")
        assert next(members).name == "0.png"
        with pytest.raises(Damage, match=message):
            next(members)


@pytest.mark.parametrize(
    ("data", "message"), [(b"\x1f\x8b" + b"x" * 600, "compressed"), (b"<html>" * 100, "not a tar")]
)
def test_what_is_no_archive_is_an_error(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.tar")


def test_a_shard_is_listed_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", ("0.png", png(1)), ("0.txt", b"one"))
    first = load(path)
    monkeypatch.setattr("diffjax.data.webdataset.list_members", None)
    assert shown(load(path)) == shown(first)
    monkeypatch.undo()
    write(path, ("0.png", png(1)), ("0.txt", b"two"), ("1.png", png(2)))
    os.utime(path, ns=(1, 1))
    assert load(path).captions == ["two", ""]
    assert load(path).stamps == [f"{path.stat().st_size}-1"] * 2
    for index in (tmp_path / "cache/index").iterdir():
        index.write_text("{")
    assert load(path).captions == ["two", ""]
    path.write_bytes(b"")  # while it is open
    with pytest.raises(BadExample, match="shorter than when"):
        first[0]


def test_pictures_are_those_of_the_archive(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    files = []
    for i, pixels in enumerate(noise):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", lossless=True)
        files.append((f"{i}.webp", file.getvalue()))
    source = load(write(tmp_path / "a.tar", *files), resolution=8)
    np.testing.assert_array_equal([source[i].image for i in range(5)], noise)
