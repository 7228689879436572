"""WebDataset: shards that are tar archives, with the files of one example one after the other."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffjax.data.captions import MAX_TEXT, CaptionError, clean, printable
from diffjax.data.decode import DEFAULT_LIMITS, SUFFIXES, WHITE, Colour, Limits, Reason
from diffjax.data.records import (
    Log,
    Look,
    PictureSource,
    Row,
    Scan,
    find_shards,
    join,
    names_of,
    scan_shards,
)
from diffjax.data.tar import NO_END, Damage, list_members, read_at

# The usual names of the files of an example, the first that is there counts; and of fields of its JSON.
_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
_CAPTIONS = ("txt", "text", "caption")
_FIELDS = ("caption", "text", "txt", "prompt")
_LABELS = ("cls",)
_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "joblib")
_MAX_JSON = 2**20
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # up to the first dot of the file's name

_Files = dict[str, tuple[int, int]]  # of one example: offset and size by extension


def load_webdataset(
    cache_dir: str | Path,
    *,
    folder: str | Path,
    resolution: int,
    split: str = "train",
    image: str | None = None,
    caption: str | None = None,
    background: Colour = WHITE,
    animated: str = "first",
    limits: Limits = DEFAULT_LIMITS,
    log: Log | None = None,
) -> PictureSource:
    """Open shards `*.tar` in which `a/0001.jpg`, `a/0001.txt` and `a/0001.json` belong together.

    The key of a file is its path up to the first dot of its name. A class may be told by a number in a file
    `….cls`. Nothing is extracted, and only pictures, texts and JSON are read: pickles, links, devices and
    paths that lead out are left alone and counted. The headers of a shard are read once, and kept in
    `cache_dir`; later every picture is read from its place.

    Where an archive is damaged or cut off, what precedes is used, and `rejected` names the shard. Files of
    one key that do not follow one another are put together, a second file of one name is rejected; the log
    tells of both.

    Args:
      cache_dir: a folder for caches.
      folder: where the shards are, or a pattern of their paths; see `diffjax.data.records.find_shards`.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: the name of a sub-folder, or how the names of the shards begin.
      image: the extension of the pictures; None for the usual ones.
      caption: the extension of the captions, or else a field of the JSON; None for the usual ones.
      background: RGB, seen through what is transparent.
      animated: "first" to take the first frame of animations, "reject" to refuse them.
      limits: which pictures are accepted.
      log: receives lines about what was found, as `print` would; None for silence.

    Raises:
      UserError: there are no shards or pictures, or a file is no tar archive.
    """
    look = Look(resolution, background, animated, limits)
    paths = find_shards(folder, split, ".tar")

    def scan(path: Path) -> Scan:
        return _scan(path, image, caption, limits.max_bytes)

    scans = scan_shards(paths, scan, cache_dir, ["webdataset", image, caption, limits.max_bytes], log)
    texts, places = join(list(zip(names_of(paths), scans, strict=True)), folder)

    def read(i: int) -> bytes:
        shard, (offset, size) = places[i]
        return read_at(paths[shard], offset, size)

    return PictureSource(read, texts, look, name=f"{Path(folder).expanduser().resolve().name}-{split}")


def _scan(path: Path, image: str | None, caption: str | None, max_bytes: int) -> Scan:
    """Find the examples of a shard, and read their texts."""
    scan = Scan()
    examples = _group(path, scan)
    for key, files in examples.items():
        name = printable(key)
        try:
            picture = next((files[e] for e in ([image.lower()] if image else _IMAGES) if e in files), None)
            if picture is None:
                raise CaptionError("there is no picture")
            if picture[1] > max_bytes:
                raise CaptionError(str(Reason.FILE_SIZE))
            captions, label = _texts(path, files, caption)
            scan.rows.append(Row(name, list(picture), captions, label))
        except CaptionError as error:
            scan.rejected.append((name, error.reason))
    return scan


def _group(path: Path, scan: Scan) -> dict[str, _Files]:
    """The files of each example, and in `scan` what is odd."""
    examples: dict[str, _Files] = {}
    odd = {"no regular files": 0, "outside": 0, "pickles": 0, "interleaved": 0}
    before = ""
    try:
        for member in list_members(path):
            parts = PurePosixPath(member.name).parts
            match = _KEY.fullmatch(member.name.removeprefix("./"))
            if member.is_folder:
                continue
            if not member.is_file:
                odd["no regular files"] += 1
            elif member.name.startswith("/") or ".." in parts or "\0" in member.name:
                odd["outside"] += 1
            elif match:
                key, extension = match[1], match[2].lower()
                odd["pickles"] += extension.rpartition(".")[2] in _PICKLES
                odd["interleaved"] += key != before and key in examples
                before = key
                files = examples.setdefault(key, {})
                if extension in files:
                    scan.rejected.append((printable(f"{key}.{extension}"), "the name is there twice"))
                else:
                    files[extension] = (member.offset, member.size)
    except Damage as error:
        if str(error) != NO_END:
            examples.pop(before, None)  # more of its files may have followed
            scan.rejected.append(("", "the archive is damaged or cut off"))
        scan.notes.append(f"{error}; the {len(examples)} examples before that are used.")
    notes = {
        "no regular files": "links, devices and the like are left alone",
        "outside": "files whose paths lead out of the archive are left alone",
        "pickles": "pickles and the like, which could run code, are never read",
        "interleaved": "times the files of one example do not follow one another: they are put together",
    }
    scan.notes += [f"{odd[kind]} {note}." for kind, note in notes.items() if odd[kind]]
    return examples


def _texts(path: Path, files: _Files, caption: str | None) -> tuple[list[str], int]:
    """The captions and the class of an example.

    Raises:
      CaptionError: the caption is refused.
    """
    label = next((_label(_read(path, files[name], 32)) for name in _LABELS if name in files), -1)
    name = next((name for name in ([caption.lower()] if caption else _CAPTIONS) if name in files), None)
    if name and name != "json":
        return [clean(_read(path, files[name], MAX_TEXT + 1))], label
    if "json" not in files:
        return [], label
    if files["json"][1] > _MAX_JSON:
        raise CaptionError(f"the JSON has more than {_MAX_JSON} bytes")
    try:
        fields = json.loads(_read(path, files["json"], _MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise CaptionError("the JSON is not valid") from error
    if not isinstance(fields, dict):
        return [], label
    return _captions(fields, [caption] if caption else _FIELDS), label


def _captions(fields: dict[str, Any], names: Sequence[str]) -> list[str]:
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [clean(text) for text in values]


def _read(path: Path, place: tuple[int, int], limit: int) -> bytes:
    return read_at(path, place[0], min(place[1], limit))


def _label(data: bytes) -> int:
    digits = data.strip()
    return int(digits) if digits.isdigit() and len(digits) < 10 else -1
