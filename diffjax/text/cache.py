"""Captions are encoded once and kept on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffjax.errors import UserError
from diffjax.text.encoder import TextEncoder, TextStates

_FORMAT = "diffjax text table 1"
# Captions encoded at a time: bounds the memory of their padded float32 states (0.2 GB for MiniLM, 32 tokens).
_CHUNK = 4096


class TextTable:
    """The encodings of a set of captions, in memory.

    Token states are held as float16 and without padding: captions are short, and the table is a fraction of
    `[captions, length, embed]`. A table can be pickled, so that a loader's workers may have it.

    Attributes:
      length: tokens per caption, padding included.
      embed: width of the token states.
      pooled_embed: width of the pooled vectors.
      captions: the captions, in the order of the table's rows.
    """

    def __init__(
        self, captions: Sequence[str], states: np.ndarray, counts: np.ndarray, pooled: np.ndarray, length: int
    ):
        """Make a table.

        Args:
          captions: distinct.
          states: the states of all real tokens, one caption after the other, `[tokens, embed]`, float16.
          counts: real tokens of each caption, `[captions]`, int32.
          pooled: `[captions, pooled_embed]`, float32.
          length: the length that lookups are padded to.
        """
        ends = np.cumsum(counts, dtype=np.int64)
        consistent = (
            states.ndim == 2
            and pooled.ndim == 2
            and len(pooled) == len(captions)
            and counts.shape == (len(captions),)
            and (states.dtype, counts.dtype, pooled.dtype) == (np.float16, np.int32, np.float32)
            and bool(((counts >= 0) & (counts <= length)).all())
            and len(states) == (ends[-1] if len(ends) else 0)
        )
        if not consistent:
            raise ValueError("the parts of a text table do not fit together")
        self.captions = list(captions)
        self.length = length
        self.embed, self.pooled_embed = states.shape[1], pooled.shape[1]
        self._states, self._counts, self._pooled, self._ends = states, counts, pooled, ends
        self._index = {caption: row for row, caption in enumerate(self.captions)}

    def __len__(self) -> int:
        return len(self.captions)

    def __contains__(self, caption: str) -> bool:
        return caption in self._index

    def lookup(self, caption: str) -> TextStates:
        """One caption: states `[length, embed]` float16, mask `[length]`, pooled `[embed]` float32."""
        row = self._index[caption]
        count, end = self._counts[row], self._ends[row]
        states = np.zeros((self.length, self.embed), np.float16)
        states[:count] = self._states[end - count : end]
        return TextStates(states, np.arange(self.length) < count, self._pooled[row])

    def rows(self, captions: Sequence[str]) -> TextStates:
        """Several captions, which may repeat, stacked: `[batch, length, embed]` and so on; never none."""
        states, masks, pooled = zip(*(self.lookup(caption) for caption in captions), strict=True)
        return TextStates(np.stack(states), np.stack(masks), np.stack(pooled))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a table is made of, as the file holds it."""
        # Python strings may hold halves of surrogate pairs; JSON's escapes would join two of them to another
        # caption, so they stand there as they are.
        text = json.dumps(self.captions, ensure_ascii=False).encode("utf-8", "surrogatepass")
        captions = np.frombuffer(text, np.uint8)
        return {"captions": captions, "states": self._states, "counts": self._counts, "pooled": self._pooled}


def embed_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    *,
    length: int,
    cache_dir: str | Path,
    log: Callable[[str], None] | None = None,
) -> TextTable:
    """Encode captions, those that the cache knows excepted.

    There is one file per encoder (its fingerprint) and length; it grows by what was missing. It is replaced
    as a whole, so of two processes that write at once the last one wins, and what the other one added is
    encoded again when it is next asked for. A damaged file is noticed and made anew.

    Args:
      encoder: the text encoder; it is not called if nothing is missing.
      captions: any strings; they may repeat.
      length: tokens per caption.
      cache_dir: a folder, made if it is not there.
      log: receives one line when captions are encoded, and one if the file was damaged.

    Returns:
      A table of at least these captions.
    """
    log = log or (lambda line: None)
    path = Path(cache_dir) / f"{encoder.name}-{encoder.fingerprint[:16]}-{length}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: the text cache cannot be made there: {error.strerror}.") from error

    key = json.dumps([_FORMAT, encoder.fingerprint, length])
    known = _empty(encoder.embed, length)
    try:
        known = _read(path, key, length)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, SafetensorError):
        log(f"{path}: the text cache cannot be read (damaged?); its captions are encoded anew.")

    missing = [caption for caption in dict.fromkeys(captions) if caption not in known]
    if not missing:
        return known
    log(f"Encoding {len(missing):,} captions with {encoder.name}, once; they are kept in {path}.")
    for start in range(0, len(missing), _CHUNK):
        chunk = missing[start : start + _CHUNK]
        known = _joined(known, chunk, encoder.encode(chunk, length=length))
    _write(path, key, known)
    return known


def _empty(embed: int, length: int) -> TextTable:
    return TextTable(
        [],
        np.empty((0, embed), np.float16),
        np.empty((0,), np.int32),
        np.empty((0, embed), np.float32),
        length,
    )


def _joined(table: TextTable, captions: list[str], encoded: TextStates) -> TextTable:
    """The table with the newly encoded captions behind its own."""
    tokens = encoded.states[encoded.mask]  # [tokens, embed]: caption after caption, since padding comes last
    if np.abs(tokens).max(initial=0.0) > np.finfo(np.float16).max or not np.isfinite(tokens).all():
        raise ValueError("the encoder's states do not fit float16")
    old = table.arrays()
    return TextTable(
        table.captions + captions,
        np.concatenate([old["states"], tokens.astype(np.float16)]),
        np.concatenate([old["counts"], encoded.mask.sum(axis=1, dtype=np.int32)]),
        # An empty table does not know how wide they are.
        np.concatenate([old["pooled"], encoded.pooled]) if len(table) else encoded.pooled,
        table.length,
    )


def _read(path: Path, key: str, length: int) -> TextTable:
    """Read a table; ValueError (or what safetensors raises) if the file is not as it was written."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in ("captions", "states", "counts", "pooled")}
    if metadata.get("key") != key or metadata.get("sha256") != _digest(key, arrays):
        raise ValueError("wrong digest")
    captions = json.loads(arrays["captions"].tobytes().decode("utf-8", "surrogatepass"))
    return TextTable(captions, arrays["states"], arrays["counts"], arrays["pooled"], length)


def _write(path: Path, key: str, table: TextTable) -> None:
    """Replace the file as a whole: a reader sees the old table or the new one, never a part."""
    arrays = table.arrays()
    content = save(arrays, metadata={"key": key, "sha256": _digest(key, arrays)})
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            partial = file.name
            file.write(content)
        os.chmod(partial, 0o644)  # temporary files are private, but a cache may be shared
        os.replace(partial, path)
    except BaseException as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: the text cache cannot be written: {error.strerror}.") from error


def _digest(key: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
