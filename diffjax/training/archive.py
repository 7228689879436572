"""Checkpoints as files: verified and read on the host, without the network that they belong to."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import run_config
from diffjax.errors import UserError
from diffjax.training import digests, keeping, manifest
from diffjax.training.manifest import DamageError


def verify(folder: Path) -> list[str]:
    """What is wrong with the files and arrays of the checkpoint in `folder`; an empty list if nothing is."""
    problems, body = [], None
    try:
        manifest.check_seal(folder)
    except DamageError as error:
        problems.append(str(error))
    try:
        body = manifest.read(folder)
    except DamageError as error:
        problems.append(str(error))
    if body is not None:
        for item in manifest.ARRAYS:
            problems += _read(folder, item, body)[0]
        try:
            read_position(folder, body)
        except DamageError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def sound_manifest(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`, after its files were compared with the seal.

    Args:
      folder: of the checkpoint.
      parts: the items whose files are looked at; all, if there are none.

    Raises:
      UserError: it is damaged, or so old that it has none.
    """
    try:
        manifest.check_seal(folder, parts)
        body = manifest.read(folder)
    except DamageError as error:
        raise UserError(f"the checkpoint {folder} is damaged: {error}.") from error
    if body is None:
        raise UserError(
            f"the checkpoint {folder} is from before there were digests; train it a step further."
        )
    return body


def read_arrays(folder: Path, item: str) -> Any:
    """An item's arrays on the host, as nested dictionaries and lists, compared with their digests.

    Args:
      folder: of the checkpoint.
      item: one of `manifest.ARRAYS`.

    Raises:
      UserError: they are damaged, or there is no manifest.
    """
    body = sound_manifest(folder, (item, manifest.ITEM))
    problems, tree = _read(folder, item, body)
    if problems:
        raise UserError(f"the checkpoint {folder} is damaged: {problems[0]}.")
    return tree


def read_position(folder: Path, body: dict[str, Any]) -> Any:
    """The loader's position; DamageError if it is not the manifest's."""
    try:
        value = json.loads((folder / "data" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamageError(f"data cannot be read ({reason(error)})") from error
    if manifest.sha256(value) != body["data"]:
        raise DamageError("the loader's position (data) is not as it was written")
    return value


def prune(folder: Path, *, keep: int, keep_every: int, keep_best: int) -> None:
    """Delete the checkpoints in a folder that are not kept, see `keeping.kept`."""
    steps = keeping.steps_in(folder)
    losses = {step: manifest.loss(folder / str(step)) if keep_best else None for step in steps}
    for step in set(steps) - keeping.kept(losses, keep=keep, keep_every=keep_every, keep_best=keep_best):
        shutil.rmtree(folder / str(step))


def check_fit(
    folder: Path, body: dict[str, Any], config: ConfigDict | None, arrays: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a checkpoint that is of another configuration, or of other arrays.

    Args:
      folder: of the checkpoint.
      body: its manifest.
      config: what it is to be of; None: of any.
      arrays: those that are wanted, by item and path.

    Raises:
      UserError: it does not fit; the difference is shown.
    """
    if config is not None and body["config"] is not None:
        lines = run_config.difference(run_config.from_dict(body["config"]), config)
        if lines:
            raise UserError(
                f"the checkpoint {folder} is of another configuration:\n{_first(lines)}\n"
                "Go on with the same values, or choose another --workdir."
            )
    lines = manifest.differing_arrays(body, arrays)
    if lines:
        raise UserError(
            f"the checkpoint {folder} is of another network or optimizer; {len(lines)} arrays differ:\n"
            f"{_first(lines)}"
        )


def not_saved(folder: Path, step: int, size: int, error: Exception) -> UserError:
    """Words for a checkpoint that could not be written.

    Args:
      folder: of all checkpoints.
      step: of the one that failed.
      size: its bytes.
      error: why.
    """
    whole = max(keeping.steps_in(folder), default=None)
    older = "There is no older checkpoint" if whole is None else f"The checkpoint of step {whole} is intact"
    return UserError(
        f"the checkpoint of step {step} could not be written to {folder}: {reason(error)}.\n"
        f"It takes about {keeping.words(size)}, and {keeping.free(folder)} are free. {older}: make room (or "
        "make the folder writable); if the run has ended, run the same command."
    )


def nothing_sound(folder: Path, found: Mapping[int, Exception], before: int | None) -> UserError:
    """Words for a folder without a sound checkpoint.

    Args:
      folder: of all checkpoints.
      found: what is wrong with those that there are, by step.
      before: the newest step that would have done.
    """
    upto = "" if before is None else f" of step {before} or before"
    if not found:
        return UserError(f"there is no checkpoint{upto} in {folder}.")
    lines = [f"  step {step}: {error}" for step, error in found.items()]
    return UserError(
        f"there is no sound checkpoint{upto} in {folder}:\n{_first(lines)}\n"
        "Bring back a copy of one, or start anew in another --workdir."
    )


def listed(arrays: list[str]) -> str:
    """Words for arrays whose digests are wrong."""
    more = f" and {len(arrays) - 4} more" if len(arrays) > 4 else ""
    return f"the digests of {', '.join(arrays[:4])}{more} are not those that were written"


def reason(error: Exception) -> str:
    """What went wrong, in one line: the operating system's words, where they are in the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    found = re.search(r"([^:\n]+) \[os_error_code", text)
    line = found[1] if found else (text.splitlines() or [type(error).__name__])[0][:300]
    return line.strip().rstrip(".")


def _first(lines: list[str]) -> str:
    return "\n".join(lines[:8]) + ("\n  …" if len(lines) > 8 else "")


def _read(folder: Path, item: str, body: dict[str, Any]) -> tuple[list[str], Any]:
    """What is wrong with an item's arrays, and the arrays."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder / item).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays = reader.restore(folder / item, restore_args=kinds)
        found = {path: digests.of_numpy(np.asarray(a)) for path, a in digests.flatten(arrays).items()}
    except Exception as error:  # Orbax and TensorStore raise many kinds for one damaged file
        return [f"{item} cannot be read ({reason(error)})"], None
    damaged = manifest.damaged_arrays(body, item, found)
    return [listed(damaged)] if damaged else [], arrays
