"""A folder of pictures, with captions from text files or a table, or with sub-folders as classes."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffjax.data.captions import TABLES, printable, read_table, read_text
from diffjax.data.decode import (
    DEFAULT_LIMITS,
    SUFFIXES,
    WHITE,
    Colour,
    Limits,
    PictureError,
    Reason,
    check_header,
    decode,
)
from diffjax.data.source import Example
from diffjax.errors import UserError

Log = Callable[[str], None]

_MAX_NAMED = 10


class Texts(NamedTuple):
    """What is known of each picture; `labels` and `classes` are empty if there are no classes."""

    captions: list[str]
    labels: list[int]
    classes: list[str]


class FolderSource:
    """The pictures of a folder, behind the interface `diffjax.data.source.Source`; decoded when asked for."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        texts: Texts,
        *,
        name: str,
        resolution: int,
        background: Colour = WHITE,
        limits: Limits = DEFAULT_LIMITS,
    ):
        """Show the `files`, relative to `root`, in that order."""
        self.name = name
        self.resolution = resolution
        self.captions, self.labels, self.classes = texts
        self.keys = [printable(file) for file in files]
        self.concepts = [self.classes[label] for label in self.labels] or self.captions
        self.styles = [""] * len(files)
        self._root = root
        self._files = list(files)
        self._background = background
        self._limits = limits

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Example:
        """Decode a picture.

        Raises:
          UserError: if it cannot be decoded although its header was right. It is not skipped: the places of
            all others, which checkpoints remember, would change.
        """
        try:
            with (self._root / self._files[i]).open("rb") as file:
                data = file.read(self._limits.max_bytes + 1)
            image = decode(data, self.resolution, background=self._background, limits=self._limits)
        except (OSError, PictureError) as error:
            raise UserError(
                f"Cannot use the picture {self.keys[i]} of {self._root}: {_why(error)}.\n"
                "Please mend that file, or remove it and start a new run."
            ) from error
        return Example(image, self.captions[i], self.keys[i], self.concepts[i], self.styles[i])


def load_folder(
    cache_dir: str | Path,
    *,
    folder: str | Path,
    resolution: int,
    split: str = "train",
    background: Colour = WHITE,
    limits: Limits = DEFAULT_LIMITS,
    log: Log | None = None,
) -> FolderSource:
    """Open a folder of pictures: all that lie in it and in its sub-folders, in the order of their paths.

    A split is the sub-folder of that name; the split `train` is the whole folder if there is none. The
    captions come from the first of these that is there:

    - `metadata.jsonl` or `metadata.csv`, with `file_name`, relative to the table's folder, and `text` or
      `caption`; pictures that the table does not list are left out;
    - files `x.txt` beside the pictures `x.jpg`; a picture without one has an empty caption;
    - the names of the sub-folders, if all pictures lie in some: these are then the classes, those of the
      split `train` for every split, and their names are the captions;
    - nothing: all captions are empty.

    Hidden files, links to what is outside of `folder`, links to folders, and pictures whose header cannot be
    read or is beyond `limits` are left out, and the log names them.

    Args:
      cache_dir: not used; every source is given one.
      folder: where the pictures are.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: the name of a sub-folder.
      background: RGB, seen through what is transparent.
      limits: which pictures are accepted.
      log: receives lines about what was found, as `print` would; None for silence.

    Raises:
      UserError: if there are no pictures, or a table is wrong.
    """
    log = log or (lambda line: None)
    if resolution < 1:
        raise UserError(f"The resolution must be at least 1, not {resolution}.")
    folder = Path(folder).expanduser()
    root = _split_folder(folder, split)
    pictures, sidecars, links = _list_files(root, folder.resolve())
    tables = [root / name for name in TABLES if (root / name).is_file()]
    table = next((path for path in tables if not _leads_out(path, folder.resolve())), None)
    captions = None
    if table is not None:
        captions = read_table(table)
        missing = sorted(set(captions) - set(pictures))
        _report(log, f"not found, though {table.name} lists them", [(name, "") for name in missing])
        unlisted = sum(picture not in captions for picture in pictures)
        if unlisted:
            log(f"{unlisted} pictures are left out: {table.name} does not list them.")
        pictures = [picture for picture in pictures if picture in captions]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        faults = list(pool.map(lambda picture: _fault(root / picture, limits), pictures))
    faulty = [(name, fault) for name, fault in zip(pictures, faults, strict=True) if fault]
    _report(log, "left out", [*((link, "a link to another place") for link in links), *faulty])
    files = [picture for picture, fault in zip(pictures, faults, strict=True) if not fault]
    if not files:
        raise UserError(f"There are no pictures in {root} that can be used ({', '.join(SUFFIXES)}).")

    if captions is not None:
        texts = Texts([captions[file] for file in files], [], [])
    elif sidecars:
        texts = Texts(_read_sidecars(root, files, sidecars, log), [], [])
    elif all("/" in file for file in files):
        texts = _classes(files, _subfolders(folder / "train" if (folder / "train").is_dir() else root), root)
    else:
        texts = Texts([""] * len(files), [], [])
        log(f"The pictures of {root} have no captions.")
    return FolderSource(
        root,
        files,
        texts,
        name=f"{folder.resolve().name}-{split}",
        resolution=resolution,
        background=background,
        limits=limits,
    )


def _split_folder(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if split in ("", ".", "..") or PurePosixPath(split).name != split:
        raise UserError(f"A split is the name of a sub-folder, not {split!r}.")
    if (folder / split).is_dir():
        if _leads_out(folder / split, folder.resolve()):
            raise UserError(f"The split {split!r} of {folder} is a link to another place.")
        return folder / split
    if split == "train":
        return folder
    raise UserError(
        f"The folder {folder} has no split {split!r}. Its sub-folders are: "
        f"{', '.join(map(printable, _subfolders(folder)[:_MAX_NAMED])) or 'none'}."
    )


def _leads_out(path: Path, outermost: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(outermost)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")
        )


def _list_files(root: Path, outermost: Path) -> tuple[list[str], set[str], list[str]]:
    """List pictures, text files, and links that lead out of `outermost`; all relative to `root`."""
    pictures, texts, links = [], set(), []
    for where, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or suffix not in (*SUFFIXES, ".txt"):
                continue
            path = Path(where, name)
            relative = path.relative_to(root).as_posix()
            if _leads_out(path, outermost):
                links.append(relative)
            elif suffix == ".txt":
                texts.add(relative)
            else:
                pictures.append(relative)
    return sorted(pictures), texts, sorted(links)


def _fault(path: Path, limits: Limits) -> str | None:
    """Say what is wrong with a picture, as far as its size and header show."""
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            return "not a regular file"
        if path.stat().st_size > limits.max_bytes:
            return str(Reason.FILE_SIZE)
        with path.open("rb") as file:
            check_header(file, limits)
    except (OSError, PictureError) as error:
        return _why(error)
    return None


def _why(error: OSError | PictureError) -> str:
    return (error.strerror or "it cannot be read") if isinstance(error, OSError) else str(error)


def _report(log: Log, what: str, files: Sequence[tuple[str, str]]) -> None:
    if files:
        log(f"{len(files)} files are {what}:")
        for name, why in files[:_MAX_NAMED]:
            log(f"  {printable(name)}: {why}" if why else f"  {printable(name)}")
        if len(files) > _MAX_NAMED:
            log(f"  and {len(files) - _MAX_NAMED} more")


def _classes(files: Sequence[str], names: Sequence[str], root: Path) -> Texts:
    index = {name: i for i, name in enumerate(names)}
    found = [file.partition("/")[0] for file in files]
    unknown = sorted(set(found) - set(index))
    if unknown:
        raise UserError(f"The class {printable(unknown[0])} of {root} is not in the split 'train'.")
    classes = [printable(name) for name in names]
    labels = [index[name] for name in found]
    return Texts([classes[label] for label in labels], labels, classes)


def _read_sidecars(root: Path, files: Sequence[str], sidecars: set[str], log: Log) -> list[str]:
    captions = []
    without = []
    for file in files:
        sidecar = os.path.splitext(file)[0] + ".txt"
        if sidecar not in sidecars:
            without.append((file, ""))
            captions.append("")
            continue
        captions.append(read_text(root / sidecar))
    _report(log, "without a caption", without)
    return captions
