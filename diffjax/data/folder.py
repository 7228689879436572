"""A folder of pictures, with captions from text files or a table, or with sub-folders as classes."""

import concurrent.futures
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffjax.data.captions import TABLES, CaptionError, printable, read_table, read_text
from diffjax.data.decode import (
    DEFAULT_LIMITS,
    SUFFIXES,
    WHITE,
    Colour,
    Limits,
    PictureError,
    Reason,
    check_header,
)
from diffjax.data.records import Log, Look, PictureSource, Texts, detail_of, reason_of
from diffjax.errors import UserError
from diffjax.untrusted import read_start

_MAX_NAMED = 10


def load_folder(
    cache_dir: str | Path,
    *,
    folder: str | Path,
    resolution: int,
    split: str = "train",
    background: Colour = WHITE,
    animated: str = "first",
    limits: Limits = DEFAULT_LIMITS,
    log: Log | None = None,
) -> PictureSource:
    """Open a folder of pictures: all that lie in it and in its sub-folders, in the order of their paths.

    A split is the sub-folder of that name; the split `train` is the whole folder if there is none. The
    captions come from the first of these that is there:

    - `metadata.jsonl` or `metadata.csv`, with `file_name`, relative to the table's folder, and `text` or
      `caption`; pictures that the table does not list are left out;
    - files `x.txt` beside the pictures `x.jpg`; a picture without one has an empty caption;
    - the names of the sub-folders, if all pictures lie in some: these are then the classes, those of the
      split `train` for every split, and their names are the captions;
    - nothing: all captions are empty.

    Hidden files, links to what is outside of `folder` and links to folders are left out. So are pictures
    whose header cannot be read or is beyond `limits`, captions that `diffjax.data.captions.clean` refuses,
    and lines of a table that are wrong: the log and the source's `rejected` name them.

    Args:
      cache_dir: not used; every source is given one.
      folder: where the pictures are.
      resolution: height and width of the pictures, see `diffjax.data.decode.decode`.
      split: the name of a sub-folder.
      background: RGB, seen through what is transparent.
      animated: "first" to take the first frame of animations, "reject" to leave them out.
      limits: which pictures are accepted.
      log: receives lines about what was found, as `print` would; None for silence.

    Raises:
      UserError: if there are no pictures, or no line of a table is right.
    """
    log = log or (lambda line: None)
    look = Look(resolution, background, animated, limits)
    folder = Path(folder).expanduser()
    root = _split_folder(folder, split)
    pictures, sidecars, links = _list_files(root, folder.resolve())
    tables = [root / name for name in TABLES if (root / name).is_file()]
    table = next((path for path in tables if not _leads_out(path, folder.resolve())), None)
    faults: list[tuple[str, str, str]] = [(link, "a link to another place", "") for link in links]
    captions = None
    if table is not None:
        captions, wrong = read_table(table)
        faults += [(name, reason, "") for name, reason in wrong]
        missing = sorted(set(captions) - set(pictures))
        _report(log, f"not found, though {table.name} lists them", [(name, "") for name in missing])
        unlisted = sum(picture not in captions for picture in pictures)
        if unlisted:
            log(f"{unlisted} pictures are left out: {table.name} does not list them.")
        pictures = [picture for picture in pictures if picture in captions]
    elif sidecars:
        captions, wrong = _read_sidecars(root, pictures, sidecars, log)
        faults += [(name, reason, "") for name, reason in wrong]
        pictures = [picture for picture in pictures if picture in captions]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda picture: _inspect(root / picture, look), pictures))
    faults += [(name, *seen[:2]) for name, seen in zip(pictures, found, strict=True) if seen.reason]
    _report(log, "left out", [(name, detail or reason) for name, reason, detail in faults])
    files = [picture for picture, seen in zip(pictures, found, strict=True) if not seen.reason]
    if not files:
        raise UserError(f"There are no pictures in {root} that can be used ({', '.join(SUFFIXES)}).")

    keys = [printable(file) for file in files]
    if captions is not None:
        texts = Texts(keys, [captions[file] for file in files])
    elif all("/" in file for file in files):
        texts = _classes(files, _subfolders(folder / "train" if (folder / "train").is_dir() else root), root)
    else:
        texts = Texts(keys, [""] * len(files))
        log(f"The pictures of {root} have no captions.")
    texts.stamps = [seen.stamp for seen in found if not seen.reason]
    texts.rejected = [(printable(name), reason) for name, reason, _ in faults]

    def read(i: int) -> bytes:
        with (root / files[i]).open("rb") as file:
            return read_start(file, limits.max_bytes + 1)

    return PictureSource(read, texts, look, name=f"{folder.resolve().name}-{split}")


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


class _Found(NamedTuple):
    """Why a picture cannot be used, or "" if nothing is wrong; and what changes with its file."""

    reason: str
    detail: str
    stamp: str = ""


def _inspect(path: Path, look: Look) -> _Found:
    """Look at the size and the header of a picture."""
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            return _Found("not a regular file", "")
        stat = path.stat()
        if stat.st_size > look.limits.max_bytes:
            raise PictureError(Reason.FILE_SIZE)
        with path.open("rb") as file:
            check_header(file, look.limits, animated=look.animated)
    except (OSError, PictureError) as error:
        return _Found(reason_of(error), detail_of(error))
    return _Found("", "", f"{stat.st_size}-{stat.st_mtime_ns}")


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
    return Texts([printable(file) for file in files], [classes[label] for label in labels], labels, classes)


def _read_sidecars(
    root: Path, pictures: Sequence[str], sidecars: set[str], log: Log
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The captions of pictures, empty where there is no text file; and those refused, with the reasons."""
    captions, rejected, without = {}, [], []
    for picture in pictures:
        sidecar = os.path.splitext(picture)[0] + ".txt"
        if sidecar not in sidecars:
            without.append((picture, ""))
            captions[picture] = ""
            continue
        try:
            captions[picture] = read_text(root / sidecar)
        except (OSError, CaptionError) as error:
            rejected.append((picture, reason_of(error)))
    _report(log, "without a caption", without)
    return captions, rejected
