"""Files that strangers wrote: read within bounds, and only where they are what and where they should be.

Nothing here runs what it reads. Pipes and devices are refused rather than waited for.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffjax.errors import UserError

# Indices of the largest models have a few MiB. Python's objects take up to 24 times the bytes of a JSON text.
_MAX_JSON_BYTES = 16 * 2**20
_MAX_DEPTH = 64  # far below what Python can recurse into, so that whatever walks through the values may


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a file that is a regular one, or a link to one, and not larger than `max_bytes`.

    Raises:
      UserError: it is something else, too large, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: is no regular file; expected one, or a link to one.")
            content = read_start(file, max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: is larger than {max_bytes >> 20} MiB; that is no such file.")
    return content


def read_start(file: BinaryIO, max_bytes: int) -> bytes:
    """The first `max_bytes` of an open regular file, or all of one that has fewer."""
    # `read` takes as much memory as it is allowed to fill, before it looks at how much there is.
    return file.read(min(max_bytes, os.fstat(file.fileno()).st_size))


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of bounded size and depth, without NaN; infinities, which diffusers writes, may be in it.

    Raises:
      UserError: there is none.
    """
    content = read_bytes(path, max_bytes)
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}; expected a JSON object.")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
    if level:
        raise UserError(f"{path}: is nested more than {_MAX_DEPTH} deep; that is no configuration.")
    return value


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links that lead out of a checkpoint's folder, to files of this computer.

    The cache of Hugging Face consists of links from `models--NAME/snapshots/COMMIT/…` to files in
    `models--NAME/blobs`; those are fine.

    Args:
      folder: where the files lie; may be a link itself, which whoever named it chose.
      paths: files and folders in it.

    Raises:
      UserError: one of them is a link to elsewhere, or to itself.
    """
    try:
        root = folder.resolve(strict=True)
        allowed = [root, *_blobs(root)]
        for path in paths:
            target = path.resolve(strict=True)
            if not any(target.is_relative_to(place) for place in allowed):
                raise UserError(
                    f"{path}: is a link out of the checkpoint, to {target}; put the file in its place."
                )
    except (OSError, RuntimeError) as error:  # the latter for links in a circle, until Python 3.13
        raise UserError(f"{folder}: holds a link that leads nowhere ({error}).") from error


def _blobs(root: Path) -> Iterator[Path]:
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            yield parent.parent.parent / "blobs"


def _inner(value: Any) -> Iterable[Any]:
    """The containers in a container."""
    values = value.values() if isinstance(value, dict) else value
    return (inner for inner in values if isinstance(inner, dict | list))


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value of JSON")
    return float(name)
