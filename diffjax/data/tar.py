"""Where the files in a tar archive lie, found without extracting or trusting anything."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from diffjax.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER = 2**16  # bytes of a long name, or of the extended header of a file
_MAX_MEMBERS = 2**20
_LONG_NAME, _EXTENDED = tarfile.GNUTYPE_LONGNAME, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# What precedes other members and is of no use here: long names of links, and headers for all that follow.
_SKIPPED = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
      name: its path; bytes that are not UTF-8 are surrogates.
      offset: where its content begins.
      size: of its content in bytes.
      is_file: whether it is a regular file, not a folder, a link, a device, or a file with holes.
      is_folder: whether it is a folder.
    """

    name: str
    offset: int
    size: int
    is_file: bool
    is_folder: bool


NO_END = "the archive has no end mark"


class Damage(ValueError):
    """An archive cannot be read beyond some point; with `NO_END`, all that there is was read."""


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Read a part of a file.

    Raises:
      ValueError: it is shorter than that.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path.name} is shorter than when it was first read")
    return data


def list_members(path: Path) -> Iterator[Member]:
    """The members of an uncompressed archive, whose content lies whole in the file.

    Headers are read one at a time, and names of at most 64 KiB.

    Raises:
      Damage: after the last good one, if the archive ends early or a header is damaged.
      UserError: the file is no tar archive, or has more than a million members.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        start = file.read(_BLOCK)
        if start.startswith(_COMPRESSED):
            raise UserError(
                f"{path} is compressed, and cannot be read in any order: please unpack it to .tar."
            )
        try:
            if len(start) == _BLOCK and any(start):
                _header(start)
        except Damage as error:
            raise UserError(f"{path} is not a tar archive: {error}.") from error
        if length < _BLOCK:
            raise Damage("the archive ends before its first file")
        file.seek(0)
        for number, member in enumerate(_members(file, length)):
            if number >= _MAX_MEMBERS:
                raise UserError(f"{path} has more than {_MAX_MEMBERS} files; please make smaller shards.")
            yield member


def _members(file: BinaryIO, length: int) -> Iterator[Member]:
    """The members from the place where `file` stands on, up to the block of zeros that ends an archive."""
    name, size = "", -1  # as told by what precedes a member's own header
    while True:
        block = file.read(_BLOCK)
        if not block:
            raise Damage(NO_END if file.tell() == length else "the archive ends within a file")
        if len(block) < _BLOCK:
            raise Damage("the archive ends within a header")
        if not any(block):
            return
        info = _header(block)
        offset = file.tell()
        if info.type in (_LONG_NAME, *_EXTENDED) and info.size > _MAX_HEADER:
            raise Damage("a name is too long")
        if info.type == _LONG_NAME:
            name = _whole(file, info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in _EXTENDED:
            told = _extended(_whole(file, info.size))
            name = told.get("path", name)
            size = _number(told["size"]) if "size" in told else size
        else:
            info.size = size if size >= 0 else info.size
            if offset + info.size > length:
                raise Damage(f"the archive ends within {(name or info.name)!r:.200}")
            if info.type not in _SKIPPED:
                is_file = info.type in _FILES and not (name or info.name).endswith("/")
                yield Member(name or info.name, offset, info.size, is_file, info.isdir())
                name, size = "", -1
        file.seek(offset + -(-info.size // _BLOCK) * _BLOCK)


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise Damage(f"a header is damaged ({error})") from error
    if not 0 <= info.size < 2**62:
        raise Damage(f"a header tells a size of {info.size}")
    return info


def _whole(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise Damage("the archive ends within a name")
    return data


def _extended(data: bytes) -> dict[str, str]:
    """The records `"%d %s=%s\\n"` of an extended header; see POSIX.1-2001, pax."""
    found = {}
    while data.strip(b"\0"):
        digits, _, _ = data[:20].partition(b" ")
        length = _number(digits.decode("ascii", "replace"))
        record, data = data[:length], data[length:]
        keyword, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < length or not equals or not record.endswith(b"\n"):
            raise Damage("an extended header is damaged")
        found[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return found


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise Damage("an extended header is damaged")
    return int(digits)
