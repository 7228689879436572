"""What sources of pictures that are decoded when asked for share: the source itself, shards, their index."""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.captions import CaptionError, printable
from diffjax.data.decode import DEFAULT_LIMITS, WHITE, Colour, Limits, PictureError, check_header, decode
from diffjax.data.source import BadExample, Example
from diffjax.errors import UserError

Log = Callable[[str], None]

UNREADABLE = "the record cannot be read"
_VERSION = 1  # of the index files
_MAX_CLASSES = 2**20  # a greater label is no label
_OTHER_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class Look:
    """How pictures are to look; see `diffjax.data.decode.decode`."""

    resolution: int
    background: Colour = WHITE
    animated: str = "first"
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise UserError(f"The resolution must be at least 1, not {self.resolution}.")
        if self.animated not in ("first", "reject"):
            raise UserError(f"data.animated is 'first' or 'reject', not {self.animated!r:.50}.")

    def decode(self, data: bytes) -> np.ndarray:
        """Decode a file.

        Raises:
          PictureError: if the picture is refused.
        """
        return decode(
            data, self.resolution, background=self.background, animated=self.animated, limits=self.limits
        )


@dataclass
class Texts:
    """What is known of each example; `labels` and `classes` are empty if there are no classes.

    Attributes:
      rejected: key and reason of examples that were found unusable, and are not among `keys`.
      stamps: of each example, what changes when its file does.
    """

    keys: list[str]
    captions: list[str]
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)


class PictureSource:
    """Captioned pictures, behind the interface `diffjax.data.source.Source`; decoded when asked for.

    Attributes:
      rejected: key and reason of examples that were found unusable when the source was opened.
      stamps: of each example, what changes when its file does.
    """

    def __init__(self, read: Callable[[int], bytes], texts: Texts, look: Look, *, name: str):
        """Show the files that `read` returns; it raises OSError, ValueError or RuntimeError if it cannot."""
        self.name = name
        self.resolution = look.resolution
        self.keys, self.captions = texts.keys, texts.captions
        self.labels, self.classes = texts.labels, texts.classes
        self.concepts = [self.classes[label] for label in self.labels] or self.captions
        self.styles = [""] * len(self.keys)
        self.rejected, self.stamps = texts.rejected, texts.stamps
        self._read, self._look = read, look

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Example:
        """Decode a picture.

        Raises:
          BadExample: if it cannot be read or decoded. It is not left out: the places of all others, which
            checkpoints remember, would change.
        """
        image = self._try(i, lambda: self._look.decode(self._read(i)))
        return Example(image, self.captions[i], self.keys[i], self.concepts[i], self.styles[i])

    def read(self, i: int) -> bytes:
        """The file of a picture, as it is stored.

        Raises:
          BadExample: if it cannot be read.
        """
        return self._try(i, lambda: self._read(i))

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of a picture, as its header tells them.

        Raises:
          BadExample: if that is enough to see that the picture cannot be used.
        """
        limits, animated = self._look.limits, self._look.animated
        return self._try(i, lambda: check_header(io.BytesIO(self._read(i)), limits, animated=animated))

    def _try(self, i: int, action: Callable[[], Any]) -> Any:
        key = self.keys[i]
        try:
            return action()
        except (OSError, ValueError, RuntimeError) as error:
            raise BadExample(key, reason_of(error), f"{printable(self.name)}: {detail_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why, in words that are the same for all examples of this kind."""
    if isinstance(error, (PictureError, CaptionError)):
        return str(error.reason)
    return error.strerror or UNREADABLE if isinstance(error, OSError) else UNREADABLE


def detail_of(error: Exception) -> str:
    """Why, as exactly as is known."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (PictureError, CaptionError)):
        return str(error)
    return f"{UNREADABLE}: {printable(str(error))[:200]}"


class Row(NamedTuple):
    """A record of a shard.

    Attributes:
      key: names it within its shard.
      place: where its picture is, as the reader of such shards understands it.
      captions: of the picture; there may be none, or several.
      label: its class, -1 if it has none.
    """

    key: str
    place: list[int]
    captions: list[str]
    label: int = -1


@dataclass
class Scan:
    """What a shard holds.

    Attributes:
      rows: its examples.
      rejected: key and reason of what cannot be used.
      notes: tell people of what is odd in it.
      classes: the names of the classes, if they are known.
      stamp: changes when the shard does.
    """

    rows: list[Row] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    stamp: str = ""


def find_shards(folder: str | Path, split: str, suffix: str) -> list[Path]:
    """The shards of a split, in the order of their names.

    They are, the first of these that are there: all in the sub-folder `split`; those of the folder whose
    names begin with `split` and one of `-_.`; and for the split `train`, all of the folder whose names do not
    begin with that of another usual split. `folder` may end in a pattern such as `cc3m-*.tar` instead, whose
    files are then the split `train`. Links that lead out of the folder are refused.

    Raises:
      UserError: if there are none.
    """
    folder = Path(folder).expanduser()
    if split in ("", ".", "..") or PurePosixPath(split).name != split:
        raise UserError(
            f"A split is the beginning of a file's name or a sub-folder's name, not {split!r:.100}."
        )
    pattern = folder.name if any(c in folder.name for c in "*?[") and not folder.exists() else ""
    root = folder.parent if pattern else folder
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    if pattern:
        found = [path for path in root.glob(pattern) if path.is_file()] if split == "train" else []
    elif (root / split).is_dir():
        found = _with_suffix((root / split).rglob("*"), suffix)
    else:
        files = _with_suffix(root.iterdir(), suffix)
        found = [path for path in files if _of_split(path, split)]
        if not found and split == "train":
            found = [path for path in files if not any(_of_split(path, other) for other in _OTHER_SPLITS)]
    if not found:
        raise UserError(f"There are no files {pattern or '*' + suffix} of the split {split!r} in {root}.")
    for path in found:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{printable(str(path))} is a link to another place, which is not followed: give data.folder "
                "the place itself, or copy the files."
            )
    return sorted(found)


def _with_suffix(paths: Iterable[Path], suffix: str) -> list[Path]:
    return [path for path in paths if path.name.endswith(suffix) and path.name[0] != "." and path.is_file()]


def _of_split(path: Path, split: str) -> bool:
    return path.name.startswith(split) and path.name[len(split) : len(split) + 1] in ("-", "_", ".")


def scan_shards(
    paths: Sequence[Path],
    scan: Callable[[Path], Scan],
    cache_dir: str | Path,
    identity: Sequence[Any],
    log: Log | None = None,
) -> list[Scan]:
    """Scan shards, or find what was seen in `cache_dir`, if size and time of a shard are the same.

    Args:
      paths: the shards.
      scan: reads one of them.
      cache_dir: a folder for caches; the indices lie in `index` below it.
      identity: what else the outcome depends on, for JSON.
      log: receives lines.
    """
    folder = Path(cache_dir).expanduser() / "index"

    def one(path: Path) -> Scan:
        stat = path.stat()
        found = [_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, *identity]
        index = folder / f"{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:24]}.json"
        known = load_index(index)
        if known is None:
            known = scan(path)
            known.stamp = f"{stat.st_size}-{stat.st_mtime_ns}"
            save_index(index, known)
        return known

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(one, paths))
    for path, seen in zip(paths, scans, strict=True):
        for note in seen.notes if log else ():
            log(f"{printable(path.name)}: {note}")  # type: ignore[misc]
    return scans


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names of shards for the keys: their paths from the folder that they share, without suffixes."""
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).with_suffix("").as_posix() for path in paths]


def join(parts: Sequence[tuple[str, Scan]], where: str | Path) -> tuple[Texts, list[tuple[int, list[int]]]]:
    """Join shards, each with a name for its part in the keys.

    An element is a picture and one of its captions; a picture without captions is one element. Where there
    are no captions at all, the names of the classes stand for them.

    Returns:
      the texts, and for each element the number of its shard and its place there.

    Raises:
      UserError: there are no elements; the message names `where` they were looked for.
    """
    texts, places = Texts([], []), []
    rows = [row for _, scan in parts for row in scan.rows]
    classes = next((scan.classes for _, scan in parts if scan.classes), [])
    if not classes and rows and max(row.label for row in rows) < _MAX_CLASSES:
        classes = [str(i) for i in range(max(row.label for row in rows) + 1)]
    # The test splits of contests are labelled -1: they are shown without labels.
    labelled = bool(rows) and all(0 <= row.label < len(classes) for row in rows)
    wordless = labelled and not any(row.captions for row in rows)
    for number, (name, scan) in enumerate(parts):
        prefix = f"{printable(name)}/" if name else ""
        texts.rejected += [((prefix + key).rstrip("/"), reason) for key, reason in scan.rejected]
        for row in scan.rows:
            captions = row.captions or [classes[row.label] if wordless else ""]
            for i, caption in enumerate(captions):
                texts.keys.append(f"{prefix}{row.key}" + (f"/{i}" if len(captions) > 1 else ""))
                texts.captions.append(caption)
                texts.stamps.append(scan.stamp)
                texts.labels += [row.label] if labelled else []
                places.append((number, row.place))
    if not texts.keys:
        why = (
            f": {len(texts.rejected)} are rejected, the first, {texts.rejected[0][0]}, because "
            if texts.rejected
            else ""
        )
        raise UserError(f"There are no pictures in {where}{why}{texts.rejected[0][1] if why else ''}.")
    texts.classes = classes
    return texts, places


def load_index(path: Path) -> Scan | None:
    """Read what `save_index` wrote; None if it is not there or damaged, for it can be made again."""
    try:
        seen = json.loads(path.read_bytes())
        rows = [
            Row(str(k), [int(n) for n in p], [str(c) for c in cs], int(n)) for k, p, cs, n in seen["rows"]
        ]
        rejected = [(str(key), str(reason)) for key, reason in seen["rejected"]]
        notes, classes = [str(note) for note in seen["notes"]], [str(name) for name in seen["classes"]]
        return Scan(rows, rejected, notes, classes, str(seen["stamp"]))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def save_index(path: Path, scan: Scan) -> None:
    """Write what was seen, whole or not at all; without it the next start only takes longer."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(vars(scan)), encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
