"""JSON, links, pipes and devices of people who mean harm."""

import os
import tracemalloc

import pytest

from diffjax.errors import UserError
from diffjax.untrusted import check_links, read_bytes, read_json


def test_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, null, -Infinity]}')
    assert read_json(path) == {"a": [1, None, float("-inf")]}
    path.write_text('{"a": ' + "[" * 62 + "]" * 62 + "}")
    assert read_json(path)
    bad = {
        "not": "[1, 2]",
        "text": '"a"',
        "cut": '{"a": ',
        "deep": "[" * 1_000_000,
        "deep objects": '{"a":' * 1_000_000,
        "closed": '{"a":' + "[" * 900 + "]" * 900 + "}",
        "just too deep": '{"a":' + "[" * 63 + "[1]" + "]" * 63 + "}",
        "digits": f'{{"a": {"9" * 9999}}}',
        "no number": '{"a": NaN}',
    }
    for text in bad.values():
        path.write_text(text)
        with pytest.raises(UserError, match=r"config.json: (is not JSON|holds a|is nested)") as error:
            read_json(path)
        assert len(str(error.value)) < 300
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="is not JSON"):
        read_json(path)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_json(tmp_path / "gone.json")


def test_gigabytes_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**36)  # of holes
    with pytest.raises(UserError, match=r"is larger than 16 MiB"):
        read_json(path)
    with open(path, "wb") as file:
        file.truncate(2**20)
    assert len(read_bytes(path, 2**20)) == 2**20
    with pytest.raises(UserError, match=r"is larger than 0 MiB"):
        read_bytes(path, 2**20 - 1)


def test_a_small_file_takes_little_memory_however_large_it_might_be(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"abc")
    tracemalloc.start()
    try:
        assert read_bytes(path, 2**33) == b"abc"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("pipe", "zeros", "folder", "circle"):
        with pytest.raises(UserError, match=rf"{name}: (is no regular file|cannot be read)"):
            read_json(tmp_path / name)


def test_links_within_a_folder_are_followed(tmp_path):
    root = tmp_path / "model"
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_text("x")
    (root / "b").symlink_to("a")
    (root / "link").symlink_to("b/file")
    (tmp_path / "here").symlink_to(root)
    for folder in (root, tmp_path / "here"):
        check_links(folder, [folder / "link", folder / "b", folder / "b" / "file"])


def cache(folder, name="models--someone--dit"):
    """A folder as Hugging Face's cache lays it out, with one file."""
    (folder / name / "blobs").mkdir(parents=True)
    (folder / name / "blobs" / "0123").write_text("x")
    part = folder / name / "snapshots" / "abcd" / "vae"
    part.mkdir(parents=True)
    (part / "file").symlink_to("../../../blobs/0123")
    return part


def test_the_cache_of_hugging_face_is_followed_and_no_other(tmp_path):
    part = cache(tmp_path)
    for folder in (part, part.parent):
        check_links(folder, [part / "file"])
    with pytest.raises(UserError, match="is a link out of"):
        check_links(cache(tmp_path, "models"), [tmp_path / "models" / "snapshots" / "abcd" / "vae" / "file"])
    other = tmp_path / "models--someone--other" / "blobs" / "0123"
    other.parent.mkdir(parents=True)
    other.write_text("x")
    (part / "other").symlink_to(other)
    with pytest.raises(UserError, match="is a link out of"):
        check_links(part, [part / "other"])


def test_a_cache_whose_blobs_lie_elsewhere_is_no_way_out(tmp_path):
    part = cache(tmp_path)
    blobs = tmp_path / "models--someone--dit" / "blobs"
    blobs.rename(tmp_path / "secrets")
    blobs.symlink_to(tmp_path / "secrets")
    with pytest.raises(UserError, match=r"link out of the checkpoint, to .*secrets/0123; put the file in"):
        check_links(part, [part / "file"])


@pytest.mark.parametrize("target", ["circle", "../other", "gone"])
def test_links_that_lead_out_or_nowhere_are_refused(tmp_path, target):
    root = tmp_path / "model"
    root.mkdir()
    (tmp_path / "other").write_text("x")
    (root / "circle").symlink_to(target)
    with pytest.raises(UserError, match=r"is a link out of|holds a link that leads nowhere"):
        check_links(root, [root / "circle"])
