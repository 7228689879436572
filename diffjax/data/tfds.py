"""Data sets that tensorflow-datasets has prepared on disk as ArrayRecord files; read without TensorFlow."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.captions import CaptionError, clean
from diffjax.data.decode import DEFAULT_LIMITS, WHITE, Colour, Limits
from diffjax.data.records import Log, Look, PictureSource, Row, Scan, join, load_index, reason_of, save_index
from diffjax.errors import UserError

# Where data sets keep their captions, unless one is told.
_CAPTIONS = ("captions/text", "caption", "captions", "text")
_NAME = re.compile(r"\w+(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_BATCH = 256  # records read at once


class Features:
    """Reads the parts of a record that are wanted, and decodes no others."""

    def __init__(self, known: Any, *, image: str, caption: str | None, label: str):
        """Choose among the `known` features; the arguments are those of `load_tfds`.

        Raises:
          ValueError: if one is missing.
        """
        import tensorflow_datasets as tfds

        known = dict(known.items())
        if not isinstance(known.get(image), tfds.features.Image):
            raise ValueError(f"there is no picture {image!r}, only: {', '.join(sorted(known))}")
        paths = [path.split("/") for path in ([caption] if caption else _CAPTIONS)]
        self.caption = next((path for path in paths if _holds_text(known, path)), None)
        if caption and not self.caption:
            raise ValueError(f"there is no caption {caption!r}, only: {', '.join(sorted(known))}")
        labels = known.get(label)
        self.label = label if isinstance(labels, tfds.features.ClassLabel) else None
        self.classes = [labels.int2str(i) for i in range(labels.num_classes)] if self.label else []
        self.image = image
        self._picture = tfds.features.FeaturesDict({image: known[image]})
        tops = [*(self.caption or [])[:1], *([self.label] if self.label else [])]
        self._texts = tfds.features.FeaturesDict({top: known[top] for top in tops})
        self._undecoded = {image: tfds.decode.SkipDecoding()}

    def picture(self, record: bytes) -> bytes:
        """The file of the picture."""
        return self._picture.deserialize_example_np(record, decoders=self._undecoded)[self.image]

    def texts(self, record: bytes) -> tuple[list[str], int]:
        """The captions, perhaps none, and the class, -1 if there is none.

        Raises:
          CaptionError: if one is refused.
        """
        found = self._texts.deserialize_example_np(record)
        label = int(found[self.label]) if self.label else -1
        if not self.caption:
            return [], label
        value = found
        for part in self.caption:
            value = value[part]
        # A caption of one record is bytes, several are a list or an array of bytes.
        return [clean(caption) for caption in np.ravel(np.asarray(value, dtype=object))], label


def load_tfds(
    cache_dir: str | Path,
    *,
    dataset: str,
    resolution: int,
    split: str = "train",
    data_dir: str | Path | None = None,
    image: str | None = None,
    caption: str | None = None,
    label: str = "label",
    background: Colour = WHITE,
    animated: str = "first",
    limits: Limits = DEFAULT_LIMITS,
    log: Log | None = None,
) -> PictureSource:
    """Open a split of a data set that tensorflow-datasets has prepared; nothing is ever downloaded.

    Captions and labels of all records are read once, and kept in `cache_dir`. Where there are no captions,
    the names of the classes stand for them.

    The data set's `features.json` names Python classes, which tensorflow-datasets imports: use only data
    that you trust as you trust an installed package.

    Args:
      cache_dir: a folder for caches; the texts lie in `tfds` below it.
      dataset: the name of the data set, as in "cifar10", "coco_captions/2014" or "imagenet2012:5.1.0";
        without a version, the newest that is there.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: as tensorflow-datasets writes it, such as "test" or "train[:90%]".
      data_dir: where data sets are prepared; None for the environment's `TFDS_DATA_DIR` or else
        `~/tensorflow_datasets`.
      image: the feature that holds the picture; None for "image".
      caption: the feature that holds a caption or a list of them; "a/b" is the feature b in a. None for the
        first that is there of "captions/text", "caption", "captions" and "text".
      label: the feature that holds the class, if there is one.
      background: RGB, seen through what is transparent.
      animated: "first" to take the first frame of animations, "reject" to refuse them.
      limits: which pictures are accepted.
      log: receives lines about the reading, as `print` would; None for silence.

    Raises:
      UserError: if the data set is not there, or has no such split or feature.
    """
    look = Look(resolution, background, animated, limits)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _find(root, dataset)
    # A second to import, for those alone who use it.
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        # It is made from the files alone: a builder made by name may ask a server for what it misses.
        builder = tfds.builder_from_directory(folder)
        features = Features(builder.info.features, image=image or "image", caption=caption, label=label)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
        size = builder.info.dataset_size
    except NotImplementedError as error:  # what tensorflow-datasets says of other formats
        raise UserError(f"{folder} has no ArrayRecord files. {_advice(root, dataset)}") from error
    except (OSError, RuntimeError, ValueError, ParseError) as error:
        raise UserError(f"Cannot open the split {split!r} of {folder}: {error}") from error

    written = (folder / "dataset_info.json").stat().st_mtime_ns
    identity = [str(folder.resolve()), written, str(size), split, features.caption, features.label]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    index = Path(cache_dir).expanduser() / "tfds" / f"{name}.json"
    seen = load_index(index)
    if seen is None or len(seen.rows) + len(seen.rejected) != len(records):
        (log or (lambda line: None))(f"Reading the captions and labels of {folder}; this is done once.")
        try:
            seen = _scan(records, features)
        except RuntimeError as error:
            raise UserError(f"Cannot read the split {split!r} of {folder}: {error}") from error
        save_index(index, seen)
    seen.stamp = str(written)
    texts, places = join([(split, seen)], folder)
    return PictureSource(
        lambda i: features.picture(records[places[i][1][0]]),
        texts,
        look,
        name=re.sub(r"[^\w.]+", "-", f"{builder.info.full_name}-{split}").strip("-"),
    )


def _find(root: Path, dataset: str) -> Path:
    """The folder of a prepared data set: `<root>/<name>[/<config>]/<version>`."""
    if not _NAME.fullmatch(dataset):
        raise UserError(
            f"A data set is written name, name/config or name/config:1.2.3, not {dataset!r:.100}."
        )
    name, _, version = dataset.partition(":")
    prepared = _versions(root / name)
    if not prepared:
        configs = [path for path in _subfolders(root / name) if _versions(path)]
        if len(configs) > 1:
            names = ", ".join(f"{name}/{path.name}" for path in configs)
            raise UserError(f"The data set {name} is there in several variants; choose one of: {names}.")
        prepared = _versions(configs[0]) if configs else {}
    if not prepared or version not in ("", *prepared):
        others = ", ".join(path.name for path in _subfolders(root) if not path.name.startswith("."))
        raise UserError(
            f"The data set {dataset} is not prepared in {root} (there are: {others or 'none'}).\n"
            f"{_advice(root, dataset)}"
        )
    newest = max(prepared, key=lambda version: [int(part) for part in version.split(".")])
    return prepared[version or newest]


def _advice(root: Path, dataset: str) -> str:
    return (
        "Where TensorFlow is installed, prepare it by: "
        f"tfds build {dataset} --data_dir={root} --file_format=array_record"
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _versions(folder: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in _subfolders(folder)
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    }


def _holds_text(known: dict[str, Any], path: Sequence[str]) -> bool:
    """Whether a feature, found by the names on the way to it, is a text or a sequence of texts."""
    import tensorflow_datasets as tfds

    feature = known.get(path[0])
    for part in path[1:]:
        while isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        feature = dict(feature.items()).get(part) if isinstance(feature, tfds.features.FeaturesDict) else None
    while isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return isinstance(feature, tfds.features.Text)


def _scan(records: Any, features: Features) -> Scan:
    if not features.caption and not features.label:
        return Scan([Row(str(i), [i], []) for i in range(len(records))])
    scan = Scan(classes=features.classes)
    for start in range(0, len(records), _BATCH):
        rows = range(start, min(start + _BATCH, len(records)))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            try:
                scan.rows.append(Row(str(row), [row], *features.texts(record)))
            except CaptionError as error:
                scan.rejected.append((str(row), reason_of(error)))
    return scan
