"""The latents of all pictures of a source on disk: means and standard deviations, in shards of ArrayRecords.

A shard appears whole or not at all: it is written under another name and renamed, so that those which are
complete are kept when the encoding is interrupted. Records carry checksums: what is damaged is never a
wrong latent. Who writes which shard is for the caller to say; to read, all must be in one folder.
"""

import contextlib
import os
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from diffjax.errors import UserError

FORMAT_VERSION = 1
SHARD = 4096  # pictures: of 256 px, 64 MiB; what an interruption loses at most

# In float16, latents of standard deviation 1 are off by 2e-4 (measured; a log-SNR of 17), a tenth of the
# least noise that they are diffused with, EDM's sigma of 0.002; in bfloat16 by 1.7e-3, nearly as much as it;
# float32 would double the files for nothing. Means and deviations beyond 65,504 are refused.
DTYPE = np.dtype("<f2")

_CHECKSUM_BYTES = 4
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # just the record that is asked for
_WRITER_OPTIONS = "group_size:1,uncompressed"  # compression saves 8 % of such numbers


class LatentCache:
    """Moments of latents, at random access from any thread once their shards are open.

    Attributes:
      folder: where the shards lie.
      count: how many pictures there are.
      shape: of what is kept of a picture: `[2, height, width, channels]`, mean and standard deviation; or
        `[2, 2, height, width, channels]`, the picture's and its mirror image's.
    """

    def __init__(self, folder: Path, *, count: int, shape: tuple[int, ...]):
        self.folder, self.count, self.shape = folder, count, shape
        self._readers: dict[int, Any] = {}

    @property
    def num_shards(self) -> int:
        """How many shards make the whole."""
        return -(-self.count // SHARD)

    def places(self, shard: int) -> range:
        """Which pictures are in a shard."""
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05d}-of-{self.num_shards:05d}.array_record"

    def num_bytes(self, pictures: int) -> int:
        """About what so many pictures take on disk."""
        return pictures * (int(np.prod(self.shape)) * DTYPE.itemsize + _CHECKSUM_BYTES)

    def open(self, shard: int) -> bool:
        """Open a shard; False if it is not there, or not as it was written.

        That is seen by its length and its ends, without reading all of it; each record is checked when it
        is read.
        """
        if shard in self._readers:
            return True
        places = self.places(shard)
        try:
            reader = array_record_module.ArrayRecordReader(str(self.path(shard)), _READER_OPTIONS)
            if reader.num_records() != len(places):
                return False
            for i in (places[0], places[-1]):
                self._moments(reader, i)
        except (OSError, RuntimeError, ValueError):
            return False
        self._readers[shard] = reader
        return True

    def write(self, shard: int, moments: Iterable[np.ndarray]) -> None:
        """Write a shard, in place of what is there.

        Args:
          shard: its number.
          moments: those of `places(shard)`, in that order, float16.

        Raises:
          UserError: there is no space, or no permission. What else is in the folder stays as it is.
        """
        path = self.path(shard)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_records(unfinished, self.places(shard), moments)
            os.replace(unfinished, path)
        except OSError as error:
            raise UserError(
                f"Cannot write the latent cache {self.folder}: {error.strerror or error}.\n"
                "Make space, or give another data.cache_dir; shards that are complete are kept."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        """The moments of picture `i`, of the cache's `shape`, float16, read-only.

        Raises:
          UserError: its shard is damaged.
        """
        shard = i // SHARD
        try:
            return self._moments(self._readers[shard], i)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.path(shard)} is damaged ({error}).\n"
                "Delete it, and run the same command again to encode its pictures anew."
            ) from error

    def add(self, element: dict[str, Any]) -> dict[str, Any]:
        """A transform: adds the `moments` of an element with its `index`."""
        return {**element, "moments": self[int(element["index"])]}

    def _moments(self, reader: Any, i: int) -> np.ndarray:
        record = reader.read([i % SHARD])[0]
        checksum, data = record[:_CHECKSUM_BYTES], record[_CHECKSUM_BYTES:]
        if _checksum(data, i) != checksum:
            raise ValueError(f"record {i % SHARD} does not match its checksum")
        return np.frombuffer(data, DTYPE).reshape(self.shape)

    def _write_records(self, path: Path, places: range, moments: Iterable[np.ndarray]) -> None:
        def on_disk(action: Any, *arguments: Any) -> Any:
            # ArrayRecord reports a full disk as a RuntimeError; errors of `moments` must pass as they are.
            try:
                return action(*arguments)
            except RuntimeError as error:
                raise OSError(str(error).split(";")[0]) from error

        writer = on_disk(array_record_module.ArrayRecordWriter, str(path), _WRITER_OPTIONS)
        for i, picture in zip(places, moments, strict=True):
            if picture.shape != self.shape or picture.dtype != DTYPE:
                raise ValueError(f"moments {picture.dtype}{picture.shape}, not {DTYPE}{self.shape}")
            data = picture.tobytes()
            on_disk(writer.write, _checksum(data, i) + data)
        on_disk(writer.close)


class RandomView:
    """Chooses the picture's moments or its mirror image's: what `RandomFlip` does to pictures."""

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`[2, 2, height, width, channels]` to `[2, height, width, channels]`."""
        return {**element, "moments": element["moments"][int(rng.random() < 0.5)]}


def _checksum(data: bytes, i: int) -> bytes:
    # It begins with the picture's place, so that records cannot change places unnoticed.
    return zlib.crc32(data, i % 2**32).to_bytes(_CHECKSUM_BYTES, "little")
