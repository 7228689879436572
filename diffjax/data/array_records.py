"""ArrayRecord files whose records are `tf.train.Example` messages, read without TensorFlow."""

import threading
from pathlib import Path
from typing import Any

from diffjax.data.captions import CaptionError, clean
from diffjax.data.decode import DEFAULT_LIMITS, WHITE, Colour, Limits
from diffjax.data.records import (
    UNREADABLE,
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

# The usual names of features; the first that is there counts.
_IMAGES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "image_bytes")
_CAPTIONS = ("caption", "captions", "text", "txt", "image/caption", "captions/text", "prompt")
_LABELS = ("label", "image/class/label", "cls")
_BATCH = 64  # records read at once
_NO_PICTURE = "there is no picture in the record"


def load_array_record(
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
    """Open files `*.array_record` of `tf.train.Example` messages with a picture's file and captions.

    A caption feature may hold several texts; a label is one whole number. Captions are read once, and kept
    in `cache_dir`. Data sets of tensorflow-datasets are better opened with `diffjax.data.tfds.load_tfds`,
    which knows the names of their features and classes.

    Native code reads these files; damaged ones can make it use much memory, or crash: open only files from
    whom you trust.

    Args:
      cache_dir: a folder for caches.
      folder: where the files are, or a pattern of their paths; see `diffjax.data.records.find_shards`.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: the name of a sub-folder, or how the names of the files begin.
      image: the feature of the pictures; None for the usual ones.
      caption: the feature of the captions; None for the usual ones.
      background: RGB, seen through what is transparent.
      animated: "first" to take the first frame of animations, "reject" to refuse them.
      limits: which pictures are accepted.
      log: receives lines about what was found, as `print` would; None for silence.

    Raises:
      UserError: there are no files or pictures, or a file is damaged.
    """
    look = Look(resolution, background, animated, limits)
    paths = find_shards(folder, split, ".array_record")

    def scan(path: Path) -> Scan:
        return _scan(path, image, caption)

    scans = scan_shards(paths, scan, cache_dir, ["array_record", image, caption], log)
    texts, places = join(list(zip(names_of(paths), scans, strict=True)), folder)
    readers = _Readers(paths)

    def read(i: int) -> bytes:
        shard, (row,) = places[i]
        return _picture(_parse(readers.read(shard, row)), image)

    return PictureSource(read, texts, look, name=f"{Path(folder).expanduser().resolve().name}-{split}")


class _Readers:
    """Readers of shards, opened when first used; for several threads."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> bytes:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _reader(self._paths[shard])
            return self._readers[shard].read([row])[0]  # a reader has one position: one thread at a time


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # Without a buffer that reads ahead, for records are asked for in any order.
    return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


def _scan(path: Path, image: str | None, caption: str | None) -> Scan:
    scan = Scan()
    try:
        reader = _reader(path)
        count = reader.num_records()
        for start in range(0, count, _BATCH):
            for row, record in enumerate(reader.read(start, min(start + _BATCH, count)), start=start):
                try:
                    scan.rows.append(_row(row, record, image, caption))
                except (CaptionError, ValueError) as error:
                    scan.rejected.append((str(row), reason_of(error)))
        reader.close()
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise UserError(f"Cannot read {path}: {brief(error)}") from error
    return scan


def _row(row: int, record: bytes, image: str | None, caption: str | None) -> Row:
    features = _parse(record)
    _picture(features, image)
    captions = next((features[n] for n in ([caption] if caption else _CAPTIONS) if n in features), None)
    label: Any = next((features[name].int64_list.value for name in _LABELS if name in features), ())
    texts = [clean(text) for text in captions.bytes_list.value] if captions else []
    return Row(str(row), [row], texts, int(label[0]) if len(label) == 1 else -1)


def _parse(record: bytes) -> Any:
    """The features of a message, by name."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"{UNREADABLE}: it is not a tf.train.Example") from error


def _picture(features: Any, image: str | None) -> bytes:
    found = next((features[name] for name in ([image] if image else _IMAGES) if name in features), None)
    if found is None or not found.bytes_list.value:
        raise CaptionError(_NO_PICTURE)
    return found.bytes_list.value[0]
