"""What a source is, in a digest; and each of its pictures decoded once, before anything is trained on it."""

import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.duplicates import dhash
from diffjax.data.progress import progress
from diffjax.data.source import BadExample, Example, Source

FORMAT_VERSION = 1
SHARD = 4096  # pictures: what an interruption loses at most
_DIGEST_BYTES = 16
_ARRAYS = ("reasons", "digests", "hashes", "sizes")
_Look = tuple[str, bytes, int, tuple[int, int]]


def fingerprint(source: Source) -> str:
    """A short digest of the keys and captions of a source, in their order, and its resolution."""
    digest = hashlib.sha256(f"{len(source)} {source.resolution}".encode())
    for texts in (source.keys, source.captions):
        digest.update(_joined(texts))
    return digest.hexdigest()[:16]


class Findings(NamedTuple):
    """What was found in pictures, in their order.

    Attributes:
      reasons: why each cannot be used, "" if it can: `[n]` of text.
      digests: of the pixels: `[n, 16]` uint8.
      hashes: `diffjax.data.duplicates.dhash` of the pixels: `[n]` uint64.
      sizes: width and height before the picture was made square, or 0: `[n, 2]` int32.
      decoded: how many were decoded for it, and not known from before.
    """

    reasons: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    decoded: int = 0


class Survivors:
    """Some examples of a source, as a source of their own: just what there would be without the others."""

    def __init__(self, source: Source, places: Sequence[int]):
        """Show the examples at `places`, in that order."""
        self.name, self.resolution, self.classes = source.name, source.resolution, source.classes
        self.keys: Sequence[str] = _picked(source.keys, places)
        self.captions: Sequence[str] = _picked(source.captions, places)
        self.concepts: Sequence[str] = _picked(source.concepts, places)
        self.styles: Sequence[str] = _picked(source.styles, places)
        self.labels: Sequence[int] = _picked(source.labels, places)
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Example:
        return self._source[self._places[i]]


def _picked(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[i] for i in places] if len(values) else []


def without(source: Source, bad: np.ndarray) -> Source:
    """A source without the examples that `bad`, booleans, marks."""
    return Survivors(source, np.flatnonzero(~bad).tolist()) if bad.any() else source


def check_pictures(
    source: Source,
    folder: Path,
    *,
    settings: str = "",
    part: tuple[int, int] = (0, 1),
    again: bool = False,
    num_threads: int = 4,
    log: Callable[[str], None] = print,
    check: Callable[[], None] = lambda: None,
) -> Findings:
    """Decode the pictures of a source, those excepted whose findings are in a folder.

    Findings are kept in shards, which appear whole or not at all. They are those of the same keys, settings,
    and, where a source has them, `stamps` (one per example: whatever changes when its file does). Where a
    source has the function `size(i)`, that is the width and height in the header. A disk that is full is a
    warning: what is not kept is decoded anew the next time.

    Args:
      source: the pictures.
      folder: where findings are kept.
      settings: whatever else the pixels depend on.
      part: (i, n): of n parts of the shards, which one.
      again: whether pictures that were found bad are decoded anew.
      num_threads: how many are decoded at a time.
      log: receives lines about progress, as `print` would.
      check: called every now and then; what it raises ends the decoding, and complete shards are kept.

    Returns:
      the findings of that part, in the order of the source.
    """
    shards = [range(i, min(i + SHARD, len(source))) for i in range(0, len(source), SHARD)][part[0] :: part[1]]
    paths = [folder / f"{_shard_name(source, shard, settings)}.npz" for shard in shards]
    known = [_load(path, len(shard)) for path, shard in zip(paths, shards, strict=True)]
    missing = sum(len(shard) for shard, found in zip(shards, known, strict=True) if found is None)
    if missing:
        log(f"Checking {missing:,} pictures of {source.name}, once; what is found is kept in {folder}.")
    report = progress(log, missing, "pictures checked")
    results = []
    pool = ThreadPoolExecutor(max(num_threads, 1))
    try:
        for shard, path, before in zip(shards, paths, known, strict=True):
            places = list(shard) if before is None else [shard[i] for i in np.flatnonzero(before.reasons)]
            if before is not None and not (again and places):
                results.append(before)
                continue
            looks = []
            ahead: Any = pool.map(lambda i: _look(source, i), places)
            with contextlib.closing(ahead):  # what is not begun then never is
                for look in ahead:
                    looks.append(look)
                    if before is None:
                        report(1)
                    if len(looks) % 64 == 0:
                        check()
            now = _merged(before, _findings(looks), places, shard)
            _save(path, now, log)
            results.append(now)
    finally:
        pool.shutdown(cancel_futures=True)
    return _joined_findings(results)


def _look(source: Source, i: int) -> _Look:
    size = getattr(source, "size", None)
    try:
        pixels = np.ascontiguousarray(source[i].image)
        before = (0, 0) if size is None else size(i)
    except BadExample as bad:
        return bad.reason, bytes(_DIGEST_BYTES), 0, (0, 0)
    return "", hashlib.blake2b(pixels, digest_size=_DIGEST_BYTES).digest(), dhash(pixels), before


def _findings(looks: Sequence[_Look]) -> Findings:
    reasons, digests, hashes, sizes = zip(*looks, strict=True) if looks else ((), (), (), ())
    return Findings(
        np.array(reasons, np.str_),
        np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST_BYTES),
        np.array(hashes, np.uint64),
        np.array(sizes, np.int32).reshape(-1, 2),
        len(looks),
    )


def _merged(before: Findings | None, now: Findings, places: Sequence[int], shard: range) -> Findings:
    """The findings of a shard, of which those at `places` are new."""
    if before is None:
        return now
    rows = [place - shard[0] for place in places]
    arrays = [before.reasons.astype(object), *(array.copy() for array in before[1:4])]  # longer texts, too
    for array, new in zip(arrays, now[:4], strict=True):
        array[rows] = new
    return now._replace(
        reasons=arrays[0].astype(np.str_), digests=arrays[1], hashes=arrays[2], sizes=arrays[3]
    )


def _joined_findings(parts: Sequence[Findings]) -> Findings:
    parts = [_findings([]), *parts]
    arrays: Any = [np.concatenate(arrays) for arrays in zip(*(part[:4] for part in parts), strict=True)]
    return Findings(*arrays)._replace(decoded=sum(part.decoded for part in parts))


def _shard_name(source: Source, shard: range, settings: str) -> str:
    stamps = getattr(source, "stamps", ())
    head = f"{FORMAT_VERSION} {source.name} {source.resolution} {len(shard)} {settings}"
    digest = hashlib.sha256(head.encode("utf-8", "backslashreplace"))
    digest.update(_joined(source.keys[i] for i in shard))
    digest.update(_joined(str(stamps[i]) for i in shard) if len(stamps) else b"")
    return digest.hexdigest()[:32]


def _joined(texts: Iterable[str]) -> bytes:
    # Lone halves of surrogate pairs, which no UTF-8 has, may come from file names.
    return "\0".join([*texts, ""]).encode("utf-8", "surrogatepass")


def _load(path: Path, count: int) -> Findings | None:
    """The findings in a file; None if it is not there, or not as it was written."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = Findings(*(arrays[name] for name in _ARRAYS))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    kinds = [array.dtype.kind for array in found[:4]]
    shapes = [array.shape for array in found[:4]]
    sound = kinds == list("Uuui") and shapes == [(count,), (count, _DIGEST_BYTES), (count,), (count, 2)]
    return found if sound else None


def _save(path: Path, found: Findings, log: Callable[[str], None]) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, **dict(zip(_ARRAYS, found[:4], strict=True)))
        os.replace(unfinished, path)
    except OSError as error:
        log(f"warning: cannot keep what was found in pictures: {path}: {error.strerror}.")
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
