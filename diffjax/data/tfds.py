"""Data sets that tensorflow-datasets has prepared on disk as ArrayRecord files; read without TensorFlow."""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.captions import clean
from diffjax.data.decode import DEFAULT_LIMITS, WHITE, Colour, Limits, PictureError, decode
from diffjax.data.source import Example
from diffjax.errors import UserError

Log = Callable[[str], None]

# Where data sets keep their captions, unless one is told.
_CAPTIONS = ("captions/text", "caption", "captions", "text")
_NAME = re.compile(r"\w+(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_BATCH = 256  # records read at once


class Texts(NamedTuple):
    """What a record says beside its picture: captions, perhaps none, and its class, -1 if it has none."""

    captions: list[str]
    label: int


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

    def texts(self, record: bytes) -> Texts:
        """The captions and the class."""
        found = self._texts.deserialize_example_np(record)
        label = int(found[self.label]) if self.label else -1
        if not self.caption:
            return Texts([], label)
        value = found
        for part in self.caption:
            value = value[part]
        # A caption of one record is bytes, several are a list or an array of bytes.
        captions = np.ravel(np.asarray(value, dtype=object))
        return Texts([clean(caption.decode("utf-8", "replace")) for caption in captions], label)


class TfdsSource:
    """A split of a prepared data set, behind the interface `diffjax.data.source.Source`.

    An element is a pair of a picture and one of its captions; a picture without captions is one element.
    """

    def __init__(
        self,
        records: Sequence[bytes],
        features: Features,
        texts: Sequence[Texts],
        *,
        name: str,
        split: str,
        resolution: int,
        background: Colour = WHITE,
        limits: Limits = DEFAULT_LIMITS,
    ):
        """Show `records`, whose `texts` are known."""
        self.name = name
        self.resolution = resolution
        self.classes = features.classes
        # The test splits of contests are labelled -1: they are shown without labels.
        labelled = all(0 <= text.label < len(self.classes) for text in texts)
        pairs = [(row, i) for row, text in enumerate(texts) for i in range(max(len(text.captions), 1))]
        self.labels = [texts[row].label for row, _ in pairs] if labelled else []
        names = [self.classes[label] for label in self.labels]
        if features.caption or not labelled:
            self.captions = [texts[row].captions[i] if texts[row].captions else "" for row, i in pairs]
        else:
            self.captions = names
        self.keys = [f"{split}/{row}/{i}" for row, i in pairs]
        self.concepts = names or self.captions
        self.styles = [""] * len(pairs)
        self._rows = [row for row, _ in pairs]
        self._records = records
        self._features = features
        self._background = background
        self._limits = limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        """Decode a picture.

        Raises:
          UserError: if it cannot be read or decoded.
        """
        row = self._rows[i]
        try:
            data = self._features.picture(self._records[row])
            image = decode(data, self.resolution, background=self._background, limits=self._limits)
        except (RuntimeError, PictureError) as error:  # ArrayRecord reports damage as a RuntimeError
            raise UserError(f"Cannot use the picture {self.keys[i]} of {self.name}: {error}.") from error
        return Example(image, self.captions[i], self.keys[i], self.concepts[i], self.styles[i])


def load_tfds(
    cache_dir: str | Path,
    *,
    dataset: str,
    resolution: int,
    split: str = "train",
    data_dir: str | Path | None = None,
    image: str = "image",
    caption: str | None = None,
    label: str = "label",
    background: Colour = WHITE,
    limits: Limits = DEFAULT_LIMITS,
    log: Log | None = None,
) -> TfdsSource:
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
      image: the feature that holds the picture.
      caption: the feature that holds a caption or a list of them; "a/b" is the feature b in a. None for the
        first that is there of "captions/text", "caption", "captions" and "text".
      label: the feature that holds the class, if there is one.
      background: RGB, seen through what is transparent.
      limits: which pictures are accepted.
      log: receives lines about the reading, as `print` would; None for silence.

    Raises:
      UserError: if the data set is not there, or has no such split or feature.
    """
    if resolution < 1:
        raise UserError(f"The resolution must be at least 1, not {resolution}.")
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _find(root, dataset)
    # A second to import, for those alone who use it.
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        # It is made from the files alone: a builder made by name may ask a server for what it misses.
        builder = tfds.builder_from_directory(folder)
        features = Features(builder.info.features, image=image, caption=caption, label=label)
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
    texts = _load_index(index, len(records))
    if texts is None:
        (log or (lambda line: None))(f"Reading the captions and labels of {folder}; this is done once.")
        try:
            texts = _read_texts(records, features)
        except RuntimeError as error:
            raise UserError(f"Cannot read the split {split!r} of {folder}: {error}") from error
        _save_index(index, texts)
    return TfdsSource(
        records,
        features,
        texts,
        name=re.sub(r"[^\w.]+", "-", f"{builder.info.full_name}-{split}").strip("-"),
        split=split,
        resolution=resolution,
        background=background,
        limits=limits,
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


def _read_texts(records: Any, features: Features) -> list[Texts]:
    if not features.caption and not features.label:
        return [Texts([], -1)] * len(records)
    starts = range(0, len(records), _BATCH)
    batches = (records.__getitems__(range(i, min(i + _BATCH, len(records)))) for i in starts)
    return [features.texts(record) for batch in batches for record in batch]


def _load_index(path: Path, count: int) -> list[Texts] | None:
    """Read what `_save_index` wrote; None if it is not there or damaged, for it can be made again."""
    try:
        texts = [Texts([str(caption) for caption in c], int(n)) for c, n in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        return None
    return texts if len(texts) == count else None


def _save_index(path: Path, texts: Sequence[Texts]) -> None:
    """Write the texts, whole or not at all; without them the next start only takes longer."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(texts), encoding="utf-8")
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
