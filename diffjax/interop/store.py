"""Folders of safetensors as diffusers and transformers write them: read lazily, written in shards.

What is read here comes from strangers: sizes are bounded, file names must be plain, links must stay in the
folder, and a pickle is refused.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffjax.errors import UserError, brief
from diffjax.untrusted import check_links, read_json

# Of all parameters of the largest diffusion models together it is one; what is parsed takes 13 times as much.
_MAX_HEADER_BYTES = 8 * 2**20
_MAX_DIMENSIONS = 16
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")  # the whole of a model may be there in half precision only
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Store:
    """The tensors of a folder, which stay on disk until they are asked for."""

    def __init__(self, folder: Path, aliases: Mapping[str, str] | None = None):
        """Open a folder with one file of safetensors, or shards and their index.

        Args:
          folder: the folder.
          aliases: parts of tensor names, by what is to stand in their place.

        Raises:
          UserError: there is none, it is a pickle, a link to elsewhere, or damaged.
        """
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        self._name: dict[str, str] = {}  # in the file
        paths = self._paths()
        check_links(folder, paths)
        for path in paths:
            file = _open(path)
            for original in file.keys():  # noqa: SIM118
                name = original
                for old, new in (aliases or {}).items():
                    name = name.replace(old, new)
                # Tied parameters may be there under all of their names.
                if name in self._files and not np.array_equal(self.read(name), file.get_tensor(original)):
                    other = f"{self._name[name]} of {self._where[name].name}"
                    raise UserError(f"{path}: tensor {original:.200} is there twice, as {other:.200} too.")
                self._files[name], self._where[name], self._name[name] = file, path, original

    def close(self) -> None:
        """Close the files; tensors cannot be read any more."""
        for file in {id(file): file for file in self._files.values()}.values():
            file.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._files.keys()

    def files(self) -> list[Path]:
        """The files that hold them."""
        return sorted(set(self._where.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(self._name[name]).get_shape())

    def dtype(self, name: str) -> str:
        """The kind of a tensor's numbers as the file calls it, such as "F32" or "BF16"."""
        return self._files[name].get_slice(self._name[name]).get_dtype()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` cuts out (one slice an axis, of step one)."""
        try:
            if not index:
                return self._files[name].get_tensor(self._name[name])
            return self._files[name].get_slice(self._name[name])[index]
        # The last three of numpy: for dtypes that it has not, and shapes that it cannot have.
        except (OSError, SafetensorError, MemoryError, AttributeError, TypeError, ValueError) as error:
            what = f"{name:.200}, {self.dtype(name)} {self.shape(name)}"
            raise UserError(
                f"{self._where[name]}: tensor {what}, cannot be read ({brief(error)})."
            ) from error

    def _paths(self) -> list[Path]:
        for variant in _VARIANTS:
            for stem in _STEMS:
                index = self.folder / f"{stem}.safetensors.index{variant}.json"
                if index.is_file():
                    return self._shards(index)
                if (self.folder / f"{stem}{variant}.safetensors").is_file():
                    return [self.folder / f"{stem}{variant}.safetensors"]
        pickles = [p.name for p in sorted(self.folder.glob("*")) if p.suffix in _PICKLES]
        if pickles:
            raise UserError(
                f"{self.folder}: has only {pickles[0]}, a pickle, which can run code when it is read. Get "
                "the model's safetensors, or rewrite it where you trust it with save_pretrained(FOLDER, "
                "safe_serialization=True) of diffusers or transformers."
            )
        expected = " or ".join(f"{stem}.safetensors" for stem in _STEMS)
        raise UserError(f"{self.folder}: holds no weights; expected {expected}, or shards with an index.")

    def _shards(self, index: Path) -> list[Path]:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(f"{index}: has no weight_map; expected names of tensors and of files.")
        names = sorted({str(name) for name in where.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: names the file {name!r}; expected a safetensors file beside it.")
            if not (self.folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not there; get it too.")
        return [self.folder / name for name in names]


def _open(path: Path) -> Any:
    """Open a file of safetensors, after checking of its header what that library does not check."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as content:
            header = int.from_bytes(content.read(8), "little")
        if header > min(_MAX_HEADER_BYTES, size):
            raise SafetensorError(f"its header is to have {header} bytes")
        file = safe_open(path, framework="numpy")
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            # With a side of 0, all others may be anything.
            if len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > 2 * size:
                raise SafetensorError(f"tensor {name:.80} cannot have its shape of {len(shape)} sides")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({brief(error)}); get it again.") from error
    return file


def write_store(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    stem: str = _STEMS[0],
    max_bytes: int = 5 * 10**9,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors as diffusers (`stem` "diffusion_pytorch_model") and transformers ("model") expect them.

    They take the place of those that are in the folder, once all are written.

    Args:
      folder: where to; made if it is not there.
      tensors: by the original library's names.
      stem: how the file names begin.
      max_bytes: what does not fit one file of this size is divided into shards with an index.
      config: what config.json is to say, if it is to be written too.

    Raises:
      UserError: they cannot be written.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            _write_shards(Path(temporary), shards, stem)
            if config is not None:
                _write_json(Path(temporary) / "config.json", config)
            _replace(folder, Path(temporary), stem)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}).") from error


def _write_shards(folder: Path, shards: list[dict[str, np.ndarray]], stem: str) -> None:
    metadata = {"format": "pt"}  # transformers asks for it
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(folder: Path, new: Path, stem: str) -> None:
    """Move files into a folder, in an order in which a part of them cannot be taken for the whole."""
    files = sorted(new.iterdir(), key=lambda path: (path.suffix == ".json", path.name == "config.json"))
    if any(path.name == "config.json" for path in files):
        (folder / "config.json").unlink(missing_ok=True)
    # Those that are left would be read in place of, or beside, the new ones.
    for path in list(folder.iterdir()):
        if path.name.startswith((f"{stem}.", f"{stem}-")) and path.suffix in (".json", ".safetensors"):
            path.unlink()
    for path in files:
        os.replace(path, folder / path.name)
