"""Parquet files with pictures and captions, such as those of data sets on the Hugging Face hub.

pyarrow, which reads them, is the extra `diffjax[parquet]`.
"""

import collections
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffjax.data.captions import CaptionError, clean
from diffjax.data.decode import DEFAULT_LIMITS, WHITE, Colour, Limits
from diffjax.data.records import (
    Log,
    Look,
    PictureSource,
    Row,
    Scan,
    find_shards,
    join,
    names_of,
    reason_of,
    scan_shards,
)
from diffjax.errors import UserError, brief

# The usual names of columns; the first that is there counts.
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")
_CAPTIONS = ("caption", "captions", "text", "txt", "prompt", "sentences", "description")
_LABELS = ("label", "labels", "cls", "fine_label")
_MAX_CACHE = 2**30  # bytes of row groups that are kept
_NO_PICTURE = "there are no bytes of a picture, at most a path"


def load_parquet(
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
    """Open files `*.parquet` with a column of pictures and, if there is one, one of captions.

    A picture is a binary value, or a struct with the binary field `bytes`, as in the data sets of Hugging
    Face; one with a path alone is refused when it is read, no other file or server is ever asked. A caption
    is a text or a list of texts. A column `label` of whole numbers tells classes; their names come from the
    files' metadata.

    Captions are read once, and kept in `cache_dir`. A picture is read with its whole row group, of which up
    to 1 GiB are kept; in random order that is fast only if the row groups are small, or all of them fit.

    pyarrow reads these files with native code, which a file made for it may crash, with no error to catch,
    or make use much memory: open only files from whom you trust.

    Args:
      cache_dir: a folder for caches.
      folder: where the files are, or a pattern of their paths; see `diffjax.data.records.find_shards`.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: the name of a sub-folder, or how the names of the files begin.
      image: the column of the pictures; None for the usual ones.
      caption: the column of the captions; None for the usual ones.
      background: RGB, seen through what is transparent.
      animated: "first" to take the first frame of animations, "reject" to refuse them.
      limits: which pictures are accepted.
      log: receives lines about what was found, as `print` would; None for silence.

    Raises:
      UserError: there are no files, rows or such columns, a file is damaged, or pyarrow is not installed.
    """
    _pyarrow()
    look = Look(resolution, background, animated, limits)
    paths = find_shards(folder, split, ".parquet")

    def scan(path: Path) -> Scan:
        return _scan(path, image, caption)

    scans = scan_shards(paths, scan, cache_dir, ["parquet", image, caption], log)
    texts, places = join(list(zip(names_of(paths), scans, strict=True)), folder)
    groups = RowGroups(paths, image)

    def read(i: int) -> bytes:
        shard, (group, row) = places[i]
        return groups.read(shard, group, row)

    return PictureSource(read, texts, look, name=f"{Path(folder).expanduser().resolve().name}-{split}")


class RowGroups:
    """The pictures of files, of which the row groups used last are kept in memory; for several threads."""

    def __init__(self, paths: Sequence[Path], image: str | None = None, *, max_bytes: int = _MAX_CACHE):
        """`image`: the column; at least one row group is kept, more only up to `max_bytes`."""
        self._paths, self._image, self._max_bytes = list(paths), image, max_bytes
        self._kept: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # also so that two threads do not read the same group

    def read(self, shard: int, group: int, row: int) -> bytes:
        """The file of a picture.

        Raises:
          OSError, ValueError: it cannot be read, or is not there.
        """
        with self._lock:
            column = self._kept.pop((shard, group), None)
            if column is None:
                column = self._load(shard, group)
            self._kept[shard, group] = column
        if row >= len(column):
            raise ValueError("the file has changed since it was first read")
        data = _bytes_of(column[row].as_py())
        if data is None:
            raise CaptionError(_NO_PICTURE)
        return data

    def _load(self, shard: int, group: int) -> Any:
        arrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(self._paths[shard]) as file:
                leaf = _leaf(file.schema_arrow, _column(file.schema_arrow, self._image, _IMAGES, "picture"))
                column = file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
        except (arrow.ArrowException, UserError, IndexError) as error:
            raise ValueError(str(error)) from error
        self._bytes += column.nbytes
        while self._kept and self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return column


def _scan(path: Path, image: str | None, caption: str | None) -> Scan:
    """Read the captions and labels of a file."""
    arrow, parquet = _pyarrow()
    scan = Scan()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            picture = _column(schema, image, _IMAGES, "picture")
            words = _column(schema, caption, _CAPTIONS, "caption", needed=bool(caption))
            label = next((name for name in _LABELS if _is_integer(schema, name)), None)
            scan.classes = _class_names(schema, label)
            if file.metadata.num_rows > path.stat().st_size:
                raise UserError(f"{path} says that it has {file.metadata.num_rows} rows: it is damaged.")
            _leaf(schema, picture)  # so that a column of another kind is refused now
            for group in range(file.num_row_groups):
                columns = [name for name in (words, label) if name]
                table = file.read_row_group(group, columns=columns, use_threads=False)
                captions = table.column(words).to_pylist() if words else None
                labels = table.column(label).to_pylist() if label else None
                for row in range(table.num_rows):
                    key = f"{group}/{row}"
                    try:
                        texts = _captions(captions[row]) if captions is not None else []
                        number = -1 if labels is None or labels[row] is None else labels[row]
                        scan.rows.append(Row(key, [group, row], texts, number))
                    except CaptionError as error:
                        scan.rejected.append((key, reason_of(error)))
    except (arrow.ArrowException, OSError, LookupError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {brief(error)}") from error
    return scan


def _column(
    schema: Any, name: str | None, usual: Sequence[str], kind: str, *, needed: bool = True
) -> str | None:
    """The column to use: the one asked for, or the first of the usual ones that is there."""
    found = next((usual for usual in ([name] if name else usual) if usual in schema.names), None)
    if found is None and needed:
        raise UserError(
            f"There is no column {name or ' or '.join(usual)!r} of the {kind}; the columns are: "
            f"{', '.join(map(repr, schema.names))!s:.500}. Choose one by data.image or data.caption."
        )
    return found


def _leaf(schema: Any, name: str | None) -> str:
    """The path of the pictures' bytes within the file."""
    arrow, _ = _pyarrow()
    kind = schema.field(name).type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes"
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return str(name)
    raise UserError(f"The column {name!r} has no bytes of pictures, but {kind!s:.100}.")


def _is_integer(schema: Any, name: str) -> bool:
    arrow, _ = _pyarrow()
    return name in schema.names and arrow.types.is_integer(schema.field(name).type)


def _bytes_of(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


def _captions(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [clean(text) for text in values]


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names of the classes, as the library `datasets` keeps them; none if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (LookupError, TypeError, ValueError, RecursionError):
        return []


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Reading Parquet files needs pyarrow: install it by `pip install diffjax[parquet]`."
        ) from error
    return pyarrow, pyarrow.parquet
