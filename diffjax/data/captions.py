"""Captions, which anyone may have written: single ones, text files, and the tables of folders of pictures."""

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
MAX_TEXT = 2**16

TOO_LONG = f"the caption has more than {MAX_TEXT} bytes"
NO_TEXT = "the caption is not text"


class CaptionError(ValueError):
    """A caption is refused, for a `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def read_text(path: Path) -> str:
    """Read the caption that a text file holds.

    Raises:
      CaptionError: see `clean`.
      OSError: if the file cannot be read.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise CaptionError("the caption is not a regular file")
    with path.open("rb") as file:
        return clean(file.read(MAX_TEXT + 1))


def clean(caption: str | bytes | None) -> str:
    """A caption as it is shown to a text encoder.

    Space around it is taken away; bytes that are not UTF-8 become the replacement character, and halves of
    characters, which have no UTF-8, a question mark; all else, such as what is written from right to left, is
    left as it is. None is the empty caption.

    Raises:
      CaptionError: it is longer than 64 KiB, is no text, or has NULs in it: those are in binary files, and
        in UTF-16, which would be misread.
    """
    if caption is None:
        return ""
    if not isinstance(caption, (str, bytes)):
        raise CaptionError(NO_TEXT)
    if len(caption) > MAX_TEXT:
        raise CaptionError(TOO_LONG)
    content = caption if isinstance(caption, bytes) else caption.encode("utf-8", "replace")
    if len(content) > MAX_TEXT:
        raise CaptionError(TOO_LONG)
    if b"\0" in content:
        raise CaptionError(NO_TEXT)
    return content.decode("utf-8-sig", "replace").strip()


def printable(name: str) -> str:
    """A file's name with escapes for what a terminal would obey, and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def read_table(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Read the caption of each file from a table with the columns `file_name` and `text` or `caption`.

    Args:
      path: a `.jsonl` file with one object per line, or a `.csv` file with a header. Bytes that are not UTF-8
        become the replacement character.

    Returns:
      captions by file name, a relative path with `/` that does not lead out of the table's folder; and what
      was left out, the file or the line with the reason: lines that are not of that form or longer than
      1 MiB, captions that `clean` refuses, and all lines but the first that name the same file.

    Raises:
      UserError: if no line is right.
    """
    captions: dict[str, str] = {}
    rejected = []
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for number, row in rows:
        key = f"{path.name}:{number}"
        try:
            name, text = _fields(row)
            key = printable(name)
            text = clean(text)
            if name in captions:
                raise CaptionError("the table names it twice")
            captions[name] = text
        except CaptionError as error:
            rejected.append((key, error.reason))
    if rejected and not captions:
        raise UserError(f"No line of {path} can be used; the first, {rejected[0][0]}: {rejected[0][1]}.")
    return captions, rejected


def _fields(row: dict[str, Any] | str) -> tuple[str, Any]:
    """The file that a row of a table names, and its caption; `row` may be a reason to refuse it instead."""
    if isinstance(row, str):
        raise CaptionError(row)
    name = row.get("file_name")
    column = next((column for column in _COLUMNS if column in row), None)
    if not isinstance(name, str) or column is None:
        raise CaptionError(f"a line of the table needs 'file_name' and {' or '.join(map(repr, _COLUMNS))}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CaptionError("the table names a file outside of its folder")
    return relative.as_posix(), row[column]


def _lines(path: Path) -> Iterator[str | None]:
    """The lines of a file, as text; None for those that are too long."""
    with path.open("rb") as file:
        encoding = "utf-8-sig"
        while line := file.readline(_MAX_LINE + 1):
            if len(line) <= _MAX_LINE:
                yield line.decode(encoding, "replace")
            else:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_MAX_LINE)
                yield None
            encoding = "utf-8"


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            if line is None:
                yield number, f"a line of the table has more than {_MAX_LINE} bytes"
            elif line.strip():
                row = json.loads(line)
                yield number, row if isinstance(row, dict) else "a line of the table is not a JSON object"
        except (ValueError, RecursionError):
            yield number, "a line of the table is not valid JSON"


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    too_long: list[int] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(_lines(path), start=1):
            if line is None:
                too_long.append(number)
            yield line or "\n"

    reader = csv.DictReader(lines())
    while True:
        row: dict[str, Any] | str | None
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = f"a line of the table is not valid CSV: {error}"
        for number in too_long:
            yield number, f"a line of the table has more than {_MAX_LINE} bytes"
        too_long.clear()
        if row is None:
            return
        yield reader.line_num, row
