"""What a checkpoint says of itself: a manifest that is written with it, and a seal over its files.

The manifest is one of the checkpoint's items, so both are there or neither is. It names every array with its
dtype, shape and digest, and holds the configuration. The seal follows when all is on disk: size and SHA-256
of each file. A process that is killed in between leaves a checkpoint without a seal, whose arrays are
verified by the manifest all the same. Nothing here needs a device or Orbax.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffjax
from diffjax.errors import UserError

ITEM = "manifest"
SEAL = "seal.json"
ARRAYS = ("params", "ema_params", "rest")

_MAX_BYTES = 2**28
_FILE = "metadata"  # what Orbax calls the one file of an item of JSON


class DamageError(Exception):
    """A checkpoint is not as it was written; the message says what differs."""


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sha256(value: Any) -> str:
    """The SHA-256 of a value's JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def describe(arrays: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Dtype, shape and digest of arrays, by path."""
    return {
        path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "digest": found[path]}
        for path, leaf in arrays.items()
    }


def make(
    step: int,
    arrays: Mapping[str, Mapping[str, Any]],
    data: Any,
    config: Mapping[str, Any] | None,
    loss: float | None,
) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
      step: the number of updates.
      arrays: for each of `ARRAYS` what `describe` says.
      data: the loader's position, of which the manifest holds the digest.
      config: the run's configuration.
      loss: by which the best are kept.
    """
    body = {
        "diffjax": diffjax.__version__,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "loss": loss,
        "arrays": arrays,
        "data": sha256(data),
        "config": config,
    }
    return {"body": body, "sha256": sha256(body)}


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the checkpoint in `folder`, or None if it was made before there were any.

    Raises:
      DamageError: it is not as it was written.
    """
    path = folder / ITEM / _FILE
    if not path.exists() and not _names_manifest(folder):
        return None
    whole = _read_json(path, folder)
    body = whole.get("body")
    if not isinstance(body, dict) or whole.get("sha256") != sha256(body) or len(whole) != 2:
        raise DamageError(f"the file {ITEM}/{_FILE} is not as it was written")
    return body


def loss(folder: Path) -> float | None:
    """The loss that the manifest of the checkpoint in `folder` tells, if it can be read."""
    try:
        body = read(folder)
    except (DamageError, UserError):
        return None
    return None if body is None else body["loss"]


def differing_arrays(manifest: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the arrays of a checkpoint differ from those that are wanted, one line each.

    Args:
      manifest: of the checkpoint.
      wanted: arrays, or anything that has a dtype and a shape, by item and path.
    """
    lines = []
    for item, arrays in wanted.items():
        there = {path: (a["dtype"], tuple(a["shape"])) for path, a in manifest["arrays"][item].items()}
        here = {path: (str(a.dtype), tuple(a.shape)) for path, a in arrays.items()}
        for path in sorted(there.keys() | here.keys()):
            if there.get(path) != here.get(path):
                kinds = (_kind(there.get(path)), _kind(here.get(path)))
                lines.append(f"  {item}/{path}: {kinds[0]} there, {kinds[1]} wanted")
    return lines


def damaged_arrays(manifest: Mapping[str, Any], item: str, found: Mapping[str, str]) -> list[str]:
    """The paths of an item's arrays whose digests are not the manifest's."""
    known = {path: array["digest"] for path, array in manifest["arrays"][item].items()}
    return [
        f"{item}/{path}" for path in sorted(known.keys() | found.keys()) if known.get(path) != found.get(path)
    ]


def write_seal(folder: Path) -> None:
    """Write down the size and the SHA-256 of each file of the checkpoint in `folder`."""
    files = {str(path.relative_to(folder)): _measure(path) for path in _files(folder)}
    temporary = folder / f".{SEAL}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(_seal_text(files))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / SEAL)


def is_sealed(folder: Path) -> bool:
    """Whether the checkpoint in `folder` has a seal, sound or not."""
    return (folder / SEAL).exists()


def check_seal(folder: Path, parts: tuple[str, ...] = ()) -> None:
    """Compare the files of a checkpoint with its seal, if it has one.

    Args:
      folder: of the checkpoint.
      parts: the items that are to be looked at; all, if there are none.

    Raises:
      DamageError: a file is missing, shorter, longer or changed.
      UserError: a file must not be read.
    """
    if not is_sealed(folder):
        return
    files = _read_json(folder / SEAL, folder).get("files")
    # To the letter: a flipped bit in white space is one, too.
    if not isinstance(files, dict) or (folder / SEAL).read_bytes() != _seal_text(files).encode():
        raise DamageError(f"the file {SEAL} is not as it was written")
    for name, (size, digest) in files.items():
        if parts and "/" in name and name.split("/")[0] not in parts:
            continue
        try:
            now = _measure(folder / name)
        except PermissionError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}.") from error
        except OSError as error:
            raise DamageError(f"the file {name} cannot be read ({error.strerror})") from error
        if now[0] != size:
            raise DamageError(f"the file {name} has {now[0]:,} bytes in place of {size:,}")
        if now[1] != digest:
            raise DamageError(f"the file {name} is not as it was written")


def _files(folder: Path) -> list[Path]:
    own = (SEAL, f".{SEAL}.tmp")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)


def _seal_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"files": files, "sha256": sha256(files)}, indent=1, sort_keys=True) + "\n"


def _measure(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _names_manifest(folder: Path) -> bool:
    try:
        return ITEM in _read_json(folder / "_CHECKPOINT_METADATA", folder)["item_handlers"]
    except (KeyError, TypeError) as error:
        raise DamageError("_CHECKPOINT_METADATA is not as it was written") from error


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DamageError(f"the file {name} is larger than {_MAX_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise DamageError(f"the file {name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamageError(f"the file {name} is not JSON") from error
    if not isinstance(value, dict):
        raise DamageError(f"the file {name} is not as it was written")
    return value


def _kind(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{kind[0]} {list(kind[1])}" if kind else "none"
