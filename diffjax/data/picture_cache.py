"""Captioned pictures on disk: PNG records in one ArrayRecord file, and an index in JSON.

A cache is a folder that appears whole or not at all: it is written under another name and renamed. What is
read is checked, so that a damaged copy is an error that says so and never a wrong picture.
"""

import contextlib
import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from diffjax.errors import UserError

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
RECORD_FILE = "pictures.array_record"
LICENCE_FILE = "LICENSES.md"

# The PNGs are smaller than a disk block or two: read just the one that is asked for.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Labels(NamedTuple):
    """The texts of a cache, each list in the order of the pictures."""

    captions: list[str]
    keys: list[str]
    concepts: list[str]
    styles: list[str]


def encode_png(image: np.ndarray) -> bytes:
    """Encode `[height, width, 3]` uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(png: bytes, resolution: int) -> np.ndarray:
    """Decode a PNG to a read-only `[resolution, resolution, 3]` uint8 array.

    Raises:
      ValueError: if the picture has another size or mode than RGB.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        # Size and mode stand in the header: nothing of an unexpected size is ever decompressed.
        if image.size != (resolution, resolution) or image.mode != "RGB":
            raise ValueError(f"a {image.mode} picture of size {image.size}")
        pixels = np.asarray(image)
    pixels.flags.writeable = False
    return pixels


def write_cache(
    folder: Path,
    pngs: Iterable[bytes],
    labels: Labels,
    *,
    resolution: int,
    packages: dict[str, str],
    licences: str,
) -> None:
    """Write a cache, unless another process has written the same folder meanwhile.

    Args:
      folder: where the cache shall be; its parent is made if need be.
      pngs: one PNG per picture, in the order of `labels`.
      labels: the texts.
      resolution: height and width of every picture.
      packages: name and version of each package that had a part in the pictures.
      licences: the text to be laid beside the pictures.

    Raises:
      UserError: if the folder cannot be written, for want of space or permission.
    """
    try:
        with _renamed_when_done(folder) as unfinished:
            checksums = _write_records(unfinished / RECORD_FILE, pngs)
            index = {
                "version": FORMAT_VERSION,
                "resolution": resolution,
                "packages": packages,
                "record_bytes": (unfinished / RECORD_FILE).stat().st_size,
                "crc32": checksums,
                **labels._asdict(),
            }
            (unfinished / LICENCE_FILE).write_text(licences, encoding="utf-8")
            text = json.dumps(index, ensure_ascii=False, indent=1)
            (unfinished / INDEX_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot write the picture cache {folder}: {error.strerror or error}.\n"
            "Give a folder that can be written and has space left."
        ) from error


@contextlib.contextmanager
def _renamed_when_done(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder`, which takes its name at the end; removed if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            os.rename(unfinished, folder)
        except OSError:
            # A folder that is not empty is never replaced: another process was faster, and wrote the same.
            if not (folder / INDEX_FILE).is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_records(path: Path, pngs: Iterable[bytes]) -> list[int]:
    """Write the records; returns their checksums."""

    def on_disk(action, argument):
        # ArrayRecord reports a full disk as a RuntimeError; errors of `pngs` itself must pass as they are.
        try:
            return action(*argument)
        except RuntimeError as error:
            raise OSError(str(error).split(";")[0]) from error

    writer = on_disk(array_record_module.ArrayRecordWriter, (str(path), "group_size:1"))
    checksums = []
    for png in pngs:
        on_disk(writer.write, (png,))
        checksums.append(zlib.crc32(png))
    on_disk(writer.close, ())
    return checksums


class PictureCache:
    """A cache that is there: its labels, and its pictures at random access from any thread.

    Attributes:
      folder: where it lies.
      labels: the texts.
      resolution: height and width of every picture.
      packages: name and version of each package that had a part in the pictures.
    """

    def __init__(self, folder: Path, *, resolution: int):
        """Open and check a cache.

        Raises:
          UserError: if it is incomplete, damaged, or not of this version or resolution.
        """
        self.folder = folder
        index = self._read_index(resolution)
        self.resolution = resolution
        self.packages: dict[str, str] = index["packages"]
        self.labels = Labels(*(index[field] for field in Labels._fields))
        self._checksums: list[int] = index["crc32"]
        self._reader = self._open_records(index["record_bytes"])

    def __len__(self) -> int:
        return len(self._checksums)

    def read(self, i: int) -> np.ndarray:
        """Read picture `i` as a read-only `[resolution, resolution, 3]` uint8 array."""
        try:
            png = self._reader.read([i])[0]
        except RuntimeError as error:
            raise self._damaged(f"record {i} of {RECORD_FILE} cannot be read") from error
        if zlib.crc32(png) != self._checksums[i]:
            raise self._damaged(f"record {i} of {RECORD_FILE} does not match its checksum")
        try:
            return decode_png(png, self.resolution)
        except (OSError, SyntaxError, ValueError) as error:
            raise self._damaged(f"record {i} of {RECORD_FILE} is not the picture it should be") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"The picture cache {self.folder} cannot be used: {what}.\n"
            "Please delete that folder and run the same command again to render it anew."
        )

    def _read_index(self, resolution: int) -> dict:
        try:
            index = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise self._damaged(f"{INDEX_FILE}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{INDEX_FILE} is not valid JSON") from error
        version = index.get("version") if isinstance(index, dict) else None
        if version != FORMAT_VERSION:
            raise self._damaged(f"its format version is {version!r:.20}, this program reads {FORMAT_VERSION}")
        fault = _fault_of_index(index)
        if fault:
            raise self._damaged(f"{INDEX_FILE}: {fault}")
        if index["resolution"] != resolution:
            raise self._damaged(f"its resolution is {index['resolution']}, not {resolution}")
        return index

    def _open_records(self, expected_bytes: int) -> array_record_module.ArrayRecordReader:
        path = self.folder / RECORD_FILE
        try:
            found_bytes = path.stat().st_size
            if found_bytes != expected_bytes:
                raise self._damaged(f"{RECORD_FILE} has {found_bytes} bytes instead of {expected_bytes}")
            reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
            found = reader.num_records()
        except (OSError, RuntimeError) as error:
            raise self._damaged(f"{RECORD_FILE} cannot be opened") from error
        # A damaged end of the file shows as a number of records that is wrong.
        if found != len(self._checksums):
            raise self._damaged(f"{RECORD_FILE} has {found} records instead of {len(self._checksums)}")
        return reader


def _fault_of_index(index: dict) -> str | None:
    """Say what is wrong with the types and lengths of an index, which anyone may have written."""

    def is_count(value) -> bool:
        return type(value) is int and value >= 0

    packages = index.get("packages")
    if not isinstance(packages, dict) or not all(isinstance(v, str) for v in packages.values()):
        return "'packages' is not a table of versions"
    for field in ("resolution", "record_bytes"):
        if not is_count(index.get(field)):
            return f"{field!r} is not a number"
    checksums = index.get("crc32")
    if not isinstance(checksums, list) or not all(map(is_count, checksums)):
        return "'crc32' is not a list of numbers"
    for field in Labels._fields:
        texts = index.get(field)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"{field!r} is not a list of texts"
        if len(texts) != len(checksums):
            return f"{field!r} has {len(texts)} entries for {len(checksums)} pictures"
    return None
