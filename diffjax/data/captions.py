"""Captions of the pictures in a folder: from a table, or from text files beside the pictures."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diffjax.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")
_COLUMNS = ("text", "caption")
# Longer lines and texts are no captions; whoever wrote them must not fill the memory.
_MAX_LINE = 2**20
_MAX_TEXT = 2**16


def read_text(path: Path) -> str:
    """Read the caption that a text file holds.

    Raises:
      UserError: if it is too long for a caption.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_TEXT + 1)
    if len(content) > _MAX_TEXT:
        raise UserError(f"The caption {printable(str(path))} has more than {_MAX_TEXT} bytes.")
    return clean(content.decode("utf-8-sig", "replace"))


def clean(caption: str) -> str:
    """A caption without space around it, and without halves of characters, which have no UTF-8."""
    return caption.encode("utf-8", "replace").decode().strip()


def printable(name: str) -> str:
    """A file's name with escapes for what a terminal would obey, and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def read_table(path: Path) -> dict[str, str]:
    """Read the caption of each file from a table with the columns `file_name` and `text` or `caption`.

    Args:
      path: a `.jsonl` file with one object per line, or a `.csv` file with a header. Bytes that are not UTF-8
        become the replacement character.

    Returns:
      captions by file name; a name is a relative path with `/` that does not lead out of the table's folder.

    Raises:
      UserError: if the table is not of that form, or names a file twice.
    """
    captions = {}
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for place, row in rows:
        name = row.get("file_name")
        texts = [row[column] for column in _COLUMNS if column in row]
        if not isinstance(name, str) or not texts or not isinstance(texts[0] or "", str):
            raise UserError(f"{place} needs texts 'file_name' and {' or '.join(map(repr, _COLUMNS))}.")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{place} names a file outside of its folder: {name!r:.200}.")
        if relative.as_posix() in captions:
            raise UserError(f"{place} names {name!r:.200} a second time.")
        captions[relative.as_posix()] = clean(texts[0] or "")
    return captions


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, as text."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise UserError(f"Line {number} of {path} has more than {_MAX_LINE} bytes.")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not valid JSON.") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object.")
        yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_lines(path))
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"Line {reader.line_num} of {path} is not valid CSV: {error}.") from error
        if row is None:
            return
        yield f"Line {reader.line_num} of {path}", row
