"""Mean and covariance of features: in a stream, over hosts, and in files that other programs read."""

import contextlib
import dataclasses
import io
import math
import os
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.errors import UserError

_MAX_WIDTH = 16384
_MAX_NAME_BYTES = 4096
_HEADER_BYTES = 10_000
# RuntimeError: of an archive that is encrypted, or packed in a way that is not known.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a Fréchet distance knows of a set of pictures.

    Attributes:
      mean: `[width]`, float64.
      cov: `[width, width]`, float64, unbiased (divided by count - 1).
      count: of how many pictures; 0 where the file does not say.
      network: the name of what made the features; "" where the file does not say.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int = 0
    network: str = ""


class Moments:
    """Mean and covariance of features that come in parts, in float64 (Chan et al., 1979).

    Parts are combined by `M = M_a + M_b + d d^T n_a n_b / (n_a + n_b)`, where M is the sum of outer products
    about the own mean and d the difference of the means. Unlike the sum of raw products, that loses no digits
    where the mean is large against the spread.
    """

    def __init__(self, width: int):
        """Begin with no examples of `width` features."""
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    @property
    def cov(self) -> np.ndarray:
        """`[width, width]`, unbiased; NaN of less than two examples."""
        return self._scatter / (self.count - 1) if self.count > 1 else np.full_like(self._scatter, math.nan)

    def add(self, features: np.ndarray) -> "Moments":
        """Take in `[n, width]` features, also n = 0; returns itself."""
        part = np.asarray(features, np.float64)
        if part.ndim != 2 or part.shape[1] != len(self.mean):
            raise ValueError(f"features are {part.shape}; expected [n, {len(self.mean)}]")
        if len(part):
            mean = part.mean(axis=0)
            centred = part - mean
            self._combine(len(part), mean, centred.T @ centred)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Take in what another of the same width has seen; returns itself."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"widths are {len(self.mean)} and {len(other.mean)}; expected equal ones")
        if other.count:
            self._combine(other.count, other.mean, other._scatter)
        return self

    def _combine(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        off = mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(off, off) * (self.count * count / total)
        self.mean = self.mean + off * (count / total)
        self.count = total

    def over_hosts(self) -> "Moments":
        """What all processes have seen together, in each of them; all must call it.

        The float64 values travel as pairs of 32-bit words, because JAX by itself would round them.
        """
        if jax.process_count() == 1:
            return self
        width = len(self.mean)
        mine = np.concatenate([[float(self.count)], self.mean, self._scatter.ravel()])
        words = np.asarray(multihost_utils.process_allgather(mine.view(np.uint32)))
        result = Moments(width)
        for row in np.ascontiguousarray(words.reshape(jax.process_count(), -1)).view(np.float64):
            part = Moments(width)
            part.count, part.mean = int(row[0]), row[1 : width + 1].copy()
            part._scatter = row[width + 1 :].reshape(width, width)
            result.merge(part)
        return result


def save_statistics(path: Path, moments: Moments | Statistics, network: str = "") -> None:
    """Write an `.npz` as pytorch-fid, EDM and guided-diffusion have it: `mu` and `sigma`; and `n`, `network`.

    Args:
      path: the file; it appears whole or not at all.
      moments: of at least two examples.
      network: the name of what made the features; others' programs ignore it, and `n`.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, mu=moments.mean, sigma=moments.cov, n=moments.count, network=network)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def load_statistics(path: Path) -> Statistics:
    """Read an `.npz` of `mu` and `sigma`, ours or another program's; nothing else in it is looked at.

    guided-diffusion's reference batches hold pictures besides, gigabytes of them, which stay unread.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    what = "expected an .npz of mu [width] and sigma [width, width]"
    if not path.is_file():  # which a pipe is not, either
        raise UserError(f"{path}: is no file; {what}.")
    try:
        with zipfile.ZipFile(path) as archive:
            mean = _array(archive, "mu", 8 * _MAX_WIDTH)
            cov = _array(archive, "sigma", 8 * len(mean) ** 2 if mean.ndim == 1 else 0)
            count = _array(archive, "n", 8, np.zeros((), int))
            network = _array(archive, "network", _MAX_NAME_BYTES, np.array(""))
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({error}); {what}.") from error
    width = mean.size
    if mean.shape != (width,) or cov.shape != (width, width) or width == 0:
        raise UserError(f"{path}: mu is {mean.shape}, sigma {cov.shape}; {what}.")
    if not all(part.dtype.kind == "f" and np.isfinite(part).all() for part in (mean, cov)):
        raise UserError(f"{path}: mu and sigma are not all finite numbers; {what}.")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * np.abs(cov).max()):
        raise UserError(f"{path}: sigma is not symmetric; {what}.")
    known = count.shape == () and count.dtype.kind in "iu" and count > 0
    named = network.shape == () and network.dtype.kind == "U"
    return Statistics(mean, (cov + cov.T) / 2.0, int(count) if known else 0, str(network) if named else "")


def _array(
    archive: zipfile.ZipFile, name: str, max_bytes: int, default: np.ndarray | None = None
) -> np.ndarray:
    """An array of an archive, its size compared with its header before memory is taken for it."""
    if default is not None and f"{name}.npy" not in archive.namelist():
        return default
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > max_bytes + _HEADER_BYTES:
        raise ValueError(f"{name} has {entry.file_size} bytes")
    content = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(content)
    data = content.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} is not what its header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
