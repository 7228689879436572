import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffjax.data.picture_cache import Labels, PictureCache, decode_png, encode_png, write_cache
from diffjax.errors import UserError

COUNT = 6
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
LABELS = Labels(*([f"{field} {i}" for i in range(COUNT)] for field in Labels._fields))


def write(folder, pngs=None):
    pngs = map(encode_png, IMAGES) if pngs is None else pngs
    write_cache(folder, pngs, LABELS, resolution=16, packages={"p": "1"}, licences="Be kind.")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"


def fault(folder) -> str:
    """The error that opening and reading a damaged cache ends with."""
    with pytest.raises(UserError) as caught:
        [PictureCache(folder, resolution=16).read(i) for i in range(COUNT)]
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert str(folder) in message
    assert "delete that folder and run the same command again to render it anew" in message
    return message


def edit_index(folder, **changes):
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(index), encoding="utf-8")


def test_round_trip(folder):
    cache = PictureCache(folder, resolution=16)
    assert len(cache) == COUNT
    assert cache.labels == LABELS
    assert cache.packages == {"p": "1"}
    for i in reversed(range(COUNT)):
        np.testing.assert_array_equal(cache.read(i), IMAGES[i])
    assert (folder / "LICENSES.md").read_text() == "Be kind."


def test_many_threads_read_at_once(folder):
    cache = PictureCache(folder, resolution=16)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(cache.read, [i % COUNT for i in range(600)]))
    np.testing.assert_array_equal(read, np.tile(IMAGES, (100, 1, 1, 1)))


def test_truncated_records(folder):
    path = folder / "pictures.array_record"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "bytes instead of" in fault(folder)


def test_missing_records(folder):
    (folder / "pictures.array_record").unlink()
    assert "cannot be opened" in fault(folder)


def test_a_flipped_byte_in_a_record(folder):
    path = folder / "pictures.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(encode_png(IMAGES[3])) + 400] ^= 1
    path.write_bytes(data)
    assert "record 3" in fault(folder)


def test_a_record_that_is_not_the_one_of_the_index(folder):
    checksums = json.loads((folder / "index.json").read_text())["crc32"]
    edit_index(folder, crc32=[*checksums[:2], checksums[2] ^ 1, *checksums[3:]])
    assert "record 2 of pictures.array_record does not match its checksum" in fault(folder)


def test_a_damaged_end_of_the_records(folder):
    path = folder / "pictures.array_record"
    data = bytearray(path.read_bytes())
    data[-65536] ^= 0xFF  # where ArrayRecord keeps its own index
    path.write_bytes(data)
    assert "0 records instead of 6" in fault(folder)


@pytest.mark.parametrize("text", ["", "{", '{"version": 1', "[" * 100_000, "\x00"])
def test_an_index_that_is_not_json(folder, text):
    (folder / "index.json").write_text(text)
    assert "not valid JSON" in fault(folder)


def test_an_index_that_is_not_text(folder):
    (folder / "index.json").write_bytes(b"\xff\xfe")
    assert "not valid JSON" in fault(folder)


def test_a_missing_index(folder):
    (folder / "index.json").unlink()
    assert "index.json: No such file" in fault(folder)


@pytest.mark.parametrize("version", [0, 2, None, "1", [1] * 1000])
def test_another_version(folder, version):
    edit_index(folder, version=version)
    assert "format version" in fault(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": "abcdef"},
        {"captions": [1] * COUNT},
        {"keys": ["k"] * (COUNT - 1)},
        {"concepts": None},
        {"crc32": ["0"] * COUNT},
        {"crc32": [True] * COUNT},
        {"crc32": [0] * (COUNT + 1)},
        {"record_bytes": 1.5},
        {"resolution": "16"},
        {"resolution": 32},
        {"packages": ["p"]},
        {"packages": {"p": 1}},
    ],
)
def test_an_index_with_wrong_types_or_lengths(folder, changes):
    edit_index(folder, **changes)
    fault(folder)


def test_a_picture_of_another_size(tmp_path):
    write(tmp_path / "cache", (encode_png(image[:8]) for image in IMAGES))
    assert "not the picture it should be" in fault(tmp_path / "cache")


@pytest.mark.parametrize("png", [b"", b"GIF89a", encode_png(IMAGES[0])[:100]])
def test_damaged_pngs(tmp_path, png):
    write(tmp_path / "cache", [png] * COUNT)
    assert "not the picture it should be" in fault(tmp_path / "cache")


def test_decoded_pictures_cannot_be_changed_by_mistake():
    image = decode_png(encode_png(IMAGES[0]), 16)
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


def test_nothing_is_left_when_rendering_fails(tmp_path):
    def pngs():
        yield encode_png(IMAGES[0])
        raise UserError("no more pictures")

    with pytest.raises(UserError, match="no more pictures"):
        write(tmp_path / "cache", pngs())
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_wins_and_both_succeed(tmp_path):
    folder = tmp_path / "cache"

    def pngs():
        for i, image in enumerate(IMAGES):
            if i == 3:
                write(folder)  # another process finishes meanwhile
                (folder / "first").touch()
            yield encode_png(image)

    write(folder, pngs())
    assert (folder / "first").exists()
    np.testing.assert_array_equal(PictureCache(folder, resolution=16).read(5), IMAGES[5])
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write the picture cache") as caught:
        write(tmp_path / "file" / "cache")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_full_disk(tmp_path):
    # A limit on the size of files fails the same way, and can be set in a process of its own.
    program = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from diffjax.data.picture_cache import Labels, write_cache
        from diffjax.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        pngs = [bytes([i]) * 1000 for i in range(100)]
        try:
            labels = Labels([], [], [], [])
            write_cache(Path(sys.argv[1]), pngs, labels, resolution=16, packages={}, licences="")
        except UserError as error:
            print(error)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Cannot write the picture cache" in done.stdout
    assert "File too large" in done.stdout
    assert len(done.stdout.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_load_renders_nothing(cache_dir, tmp_path, monkeypatch):
    from diffjax.data import emoji

    shutil.copytree(cache_dir, tmp_path / "copy")
    monkeypatch.setattr(emoji, "render", None)
    lines = []
    source = emoji.load_emoji(tmp_path / "copy", resolution=64, log=lines.append)
    assert len(source) > 3000
    assert lines == []
