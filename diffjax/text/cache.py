"""Captions are encoded once and kept on disk.

The cache of an encoder is a folder of shards, each written as a whole: what was encoded before an
interruption stays. Token states are not read into memory but mapped, as float16 and without padding: captions
are short, and a shard is a fraction of `[captions, length, embed]`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from diffjax.errors import UserError
from diffjax.text.encoder import TextEncoder, TextStates

_FORMAT = "diffjax text table 2"
# Captions encoded at a time, and bytes of their padded float32 states: both bound the memory that it takes.
_CHUNK = 4096
_CHUNK_BYTES = 2**28
# Token states of a shard; shards of less than half are put together when something is added.
_SHARD_BYTES = 2**26
_DTYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U8": np.uint8}


class _Shard(NamedTuple):
    """Some captions.

    Attributes:
      captions: distinct.
      states: of all real tokens, one caption after the other, `[tokens, embed]`, float16.
      counts: real tokens of each caption, `[captions]`, int32.
      pooled: `[captions, pooled_embed]`, float32.
    """

    captions: list[str]
    states: np.ndarray
    counts: np.ndarray
    pooled: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What the file holds."""
        # Python strings may hold halves of surrogate pairs; JSON's escapes would join two of them to another
        # caption, so they stand there as they are.
        text = json.dumps(self.captions, ensure_ascii=False).encode("utf-8", "surrogatepass")
        captions = np.frombuffer(text, np.uint8)
        return {"captions": captions, "states": self.states, "counts": self.counts, "pooled": self.pooled}


class TextTable:
    """The encodings of a set of captions; states of tokens stay on disk until they are looked up.

    Attributes:
      length: tokens per caption, padding included.
      embed: width of the token states.
      pooled_embed: width of the pooled vectors.
    """

    def __init__(self, shards: Sequence[_Shard], *, embed: int, length: int):
        """Make a table of what `embed_captions` has encoded."""
        self.length = length
        self.embed = embed
        self.pooled_embed = shards[0].pooled.shape[1] if shards else embed
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard.captions) for shard in shards)])
        self._ends = [np.cumsum(shard.counts, dtype=np.int64) for shard in shards]
        captions = (caption for shard in shards for caption in shard.captions)
        self._index = {caption: row for row, caption in enumerate(captions)}

    @property
    def captions(self) -> list[str]:
        """The captions."""
        return list(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, caption: str) -> bool:
        return caption in self._index

    def lookup(self, caption: str) -> TextStates:
        """One caption: states `[length, embed]` float16, mask `[length]`, pooled `[embed]` float32."""
        place = self._index[caption]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        shard, row = self._shards[number], place - self._starts[number]
        count, end = shard.counts[row], self._ends[number][row]
        states = np.zeros((self.length, self.embed), np.float16)
        states[:count] = shard.states[end - count : end]
        return TextStates(states, np.arange(self.length) < count, np.asarray(shard.pooled[row]))

    def rows(self, captions: Sequence[str]) -> TextStates:
        """Several captions, which may repeat, stacked: `[batch, length, embed]` and so on; never none."""
        states, masks, pooled = zip(*(self.lookup(caption) for caption in captions), strict=True)
        return TextStates(np.stack(states), np.stack(masks), np.stack(pooled))


def embed_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    *,
    length: int,
    cache_dir: str | Path,
    log: Callable[[str], None] | None = None,
    write: bool = True,
    agree: Callable[[np.ndarray], np.ndarray] = lambda missing: missing,
) -> TextTable:
    """Encode captions, those that the cache knows excepted.

    There is one folder per encoder (its fingerprint) and length; what was missing is added as new shards,
    which have names of their own: several processes may add at once. A damaged shard is noticed and made
    anew.

    Args:
      encoder: the text encoder; it is not called if nothing is missing.
      captions: any strings; they may repeat.
      length: tokens per caption.
      cache_dir: a folder, made if it is not there.
      log: receives one line when captions are encoded, and one for each damaged shard.
      write: whether what is encoded is kept on disk; otherwise it is in memory.
      agree: where several processes call this together, which captions are missing in any of them, from which
        are missing in this one, `[distinct captions]` bool.

    Returns:
      A table of at least these captions.

    Raises:
      UserError: the cache cannot be written.
    """
    log = log or (lambda line: None)
    key = json.dumps([_FORMAT, encoder.fingerprint, length])
    name = f"{encoder.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}-{length}"
    folder = Path(cache_dir) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: the text cache cannot be made there: {error.strerror}.") from error

    known, damaged = _open(folder, key, length, log)
    table = TextTable(list(known.values()), embed=encoder.embed, length=length)
    distinct = list(dict.fromkeys(captions))
    lacking = agree(np.array([caption not in table for caption in distinct], bool))
    missing = [distinct[i] for i in np.flatnonzero(lacking)]
    if not missing:
        return table
    log(f"Encoding {len(missing):,} captions with {encoder.name}, once; they are kept in {folder}.")
    small = {path: shard for path, shard in known.items() if shard.states.nbytes < _SHARD_BYTES // 2}
    shards = [shard for path, shard in known.items() if path not in small]
    for parts in _encoded(encoder, missing, table, list(small.values())):
        if not write:
            shards.append(_joined(parts))
            continue
        new, shard = _write(folder, key, length, _joined(parts))
        shards.append(shard)
        # What the new one holds too is not needed any more.
        for path in {*small, *damaged} - {new}:
            path.unlink(missing_ok=True)
        small, damaged = {}, []
    return TextTable(shards, embed=encoder.embed, length=length)


def _encoded(
    encoder: TextEncoder, captions: Sequence[str], table: TextTable, parts: list[_Shard]
) -> Iterator[list[_Shard]]:
    """Encode captions; lists of what is to be one shard, of which the first begins with `parts`.

    What the table has already is encoded, for the sake of processes that do it together, but left out.
    """
    size = max(min(_CHUNK, _CHUNK_BYTES // (4 * table.length * encoder.embed)), 1)
    for start in range(0, len(captions), size):
        chunk = captions[start : start + size]
        encoded = encoder.encode(chunk, length=table.length)
        new = np.flatnonzero([caption not in table for caption in chunk])
        parts.append(_packed([chunk[int(i)] for i in new], TextStates(*(array[new] for array in encoded))))
        if sum(part.states.nbytes for part in parts) >= _SHARD_BYTES or start + size >= len(captions):
            if any(part.captions for part in parts):
                yield parts
            parts = []


def _packed(captions: list[str], encoded: TextStates) -> _Shard:
    tokens = encoded.states[encoded.mask]  # [tokens, embed]: caption after caption, since padding comes last
    if np.abs(tokens).max(initial=0.0) > np.finfo(np.float16).max or not np.isfinite(tokens).all():
        raise ValueError("the encoder's states do not fit float16")
    counts = encoded.mask.sum(axis=1, dtype=np.int32)
    return _Shard(captions, tokens.astype(np.float16), counts, encoded.pooled)


def _joined(parts: list[_Shard]) -> _Shard:
    """One shard of several; what two of them have, because two processes encoded it at once, is kept once."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        new = np.array([caption not in seen for caption in part.captions], bool)
        seen.update(part.captions)
        captions = [part.captions[i] for i in np.flatnonzero(new)]
        states = part.states[np.repeat(new, part.counts)]
        if captions:
            kept.append(_Shard(captions, states, part.counts[new], part.pooled[new]))
    captions, *arrays = zip(*kept, strict=True)
    return _Shard([one for some in captions for one in some], *(np.concatenate(array) for array in arrays))


def _open(
    folder: Path, key: str, length: int, log: Callable[[str], None]
) -> tuple[dict[Path, _Shard], list[Path]]:
    """The shards of a folder, and the files that are damaged."""
    known, damaged = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            known[path] = _read(path, key, length)
        except FileNotFoundError:
            continue  # another process has just put it together with others
        except (OSError, ValueError, KeyError, TypeError):
            log(f"{path}: the text cache cannot be read (damaged?); its captions are encoded anew.")
            damaged.append(path)
    return known, damaged


def _read(path: Path, key: str, length: int) -> _Shard:
    """Map a shard; ValueError, KeyError or TypeError if the file is not as it was written."""
    # safetensors would copy the arrays; the format is so simple that they can be mapped where they are.
    content = np.memmap(path, np.uint8, "r")
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        first, last = (begin + offset for offset in entry["data_offsets"])
        arrays[name] = content[first:last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if metadata["key"] != key or metadata["sha256"] != _digest(key, arrays):
        raise ValueError("wrong digest")
    captions = json.loads(arrays["captions"].tobytes().decode("utf-8", "surrogatepass"))
    shard = _Shard(captions, arrays["states"], np.array(arrays["counts"]), arrays["pooled"])
    if not len(captions) == len(shard.counts) == len(shard.pooled) or shard.counts.max(initial=0) > length:
        raise ValueError("the parts of a shard do not fit together")
    return shard


def _write(folder: Path, key: str, length: int, shard: _Shard) -> tuple[Path, _Shard]:
    """Write a shard as a whole, a reader never sees a part; returns where it is, and the shard mapped."""
    arrays = shard.arrays()
    digest = _digest(key, arrays)
    path, partial = folder / f"{digest[:32]}.safetensors", None
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            partial = file.name
            file.write(save(arrays, metadata={"key": key, "sha256": digest}))
        os.chmod(partial, 0o644)  # temporary files are private, but a cache may be shared
        os.replace(partial, path)
    except BaseException as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: the text cache cannot be written: {error.strerror}.") from error
    try:
        return path, _read(path, key, length)
    except FileNotFoundError:  # another process has put it together with others by now
        return path, shard


def _digest(key: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
