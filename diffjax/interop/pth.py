"""Tensors of PyTorch's .pth files, without PyTorch and without unpickling (see `diffjax.interop.pickled`).

Both formats are read: that of PyTorch before 1.6 (five pickles, then the numbers), and the zip archive of
today. Source: `torch/serialization.py`.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffjax.errors import UserError, brief
from diffjax.interop.pickled import Program, Refused, Tensor, text
from diffjax.interop.store import Store
from diffjax.untrusted import read_bytes

_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_FILE_BYTES = 2**34
_MOST_DIMENSIONS = 16
# What the parsers of pickles and archives, and numpy, say of damaged files.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    OSError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_KINDS = {np.float64: "F64", np.float32: "F32", np.float16: "F16", ml_dtypes.bfloat16: "BF16"}


class PthStore(Store):
    """The tensors of .pth files, as `Store` has those of safetensors."""

    def __init__(self, *paths: Path):
        """Read files, of one folder.

        Raises:
          UserError: one cannot be read, is damaged, or does what no file of tensors does.
        """
        self.folder, self._paths_read = paths[0].parent, list(paths)
        self._tensors = {name: tensor for path in paths for name, tensor in read_pth(path).items()}

    def close(self) -> None:
        """Forget the tensors."""
        self._tensors = {}

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._tensors.keys()

    def files(self) -> list[Path]:
        """The files."""
        return self._paths_read

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The kind of a tensor's numbers as safetensors would call it if they are floats, such as "F32"."""
        kind = self._tensors[name].dtype
        return _KINDS.get(kind.type, str(kind))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` cuts out."""
        return self._tensors[name][index]


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote.

    Raises:
      UserError: the file cannot be read, is damaged, or does what no file of tensors does.
    """
    content = read_bytes(path, _MOST_FILE_BYTES)
    try:
        tree, storages = (_read_zip if content[:2] == b"PK" else _read_legacy)(content)
        if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
            raise Refused("it holds something else than tensors by their names")
        return {text(name): _array(tensor, storages) for name, tensor in tree.items()}
    except Refused as error:
        reason = str(error)
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {brief(error)}"
    raise UserError(f"{path}: is no state dict that torch.save wrote, or damaged ({reason}); get it again.")


def _read_legacy(content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    file = io.BytesIO(content)
    programs = [Program() for _ in range(5)]
    magic, _, system, tree, keys = (program.run(file) for program in programs)
    if magic != _MAGIC or not system.get("little_endian"):
        raise Refused("it does not begin as such files do on little-endian computers")
    known, arrays, start = programs[3].storages, {}, file.tell()
    for key in keys:
        storage = known[text(key)]
        if int.from_bytes(content[start : start + 8], "little") != storage.size:
            raise Refused(f"storage {storage.key:.20} is not where it should be")
        arrays[key] = np.frombuffer(content, storage.dtype, storage.size, start + 8)
        start += 8 + arrays[key].nbytes
    return tree, arrays


def _read_zip(content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        (root,) = {
            name.removesuffix("data.pkl")
            for name in entries
            if name.count("/") == 1 and name.endswith("/data.pkl")
        }
        left = len(content)

        def read(name: str) -> bytes:
            nonlocal left
            entry = entries[root + name]
            left -= entry.file_size  # entries may overlap
            if entry.compress_type != zipfile.ZIP_STORED or left < 0:
                raise Refused("its archive is compressed, or says that it holds more than it has bytes")
            return archive.read(entry)

        if root + "byteorder" in entries and read("byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        program = Program()
        tree = program.run(io.BytesIO(read("data.pkl")))
        arrays = {
            key: np.frombuffer(read(f"data/{key}"), storage.dtype, storage.size)
            for key, storage in program.storages.items()
        }
    return tree, arrays


def _array(tensor: Tensor, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    """A tensor's numbers, all of which must be in its storage, and none twice."""
    storage, start, shape, strides = tensor
    numbers = (start, *shape, *strides)
    most = 2 * _MOST_DIMENSIONS + 1
    if len(numbers) > most or len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor has no proper shape")
    last = start + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    count = int(np.prod(shape, dtype=object))
    if (count and last >= storage.size) or count > storage.size:
        raise Refused("a tensor reaches beyond its storage")
    flat = storages[storage.key]
    if not count:
        return np.empty(shape, flat.dtype)
    steps = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[start:], shape, steps, writeable=False)
