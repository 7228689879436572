"""Which checkpoints of a run stay, and the names of the folders that they lie in."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

DAMAGED = "damaged"
LEFT = "left"

_UNFINISHED = ".orbax-checkpoint-tmp"


def steps_in(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, rising; a checkpoint gets its name when it is whole."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def kept(
    losses: Mapping[int, float | None], *, keep: int, keep_every: int = 0, keep_best: int = 0
) -> set[int]:
    """The steps that stay: the newest, those of every so many steps, and those of the least loss.

    Args:
      losses: the loss of each step, if it is known.
      keep: how many of the newest.
      keep_every: those whose number it divides; 0: none.
      keep_best: how many of the least loss; those without one are not among them.
    """
    steps = sorted(losses)
    known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = sorted(known, key=lambda step: (known[step], -step))[:keep_best]
    every = [step for step in steps if keep_every and step % keep_every == 0]
    return {*steps[-max(keep, 1) :], *every, *best}


def put_away(folder: Path, step: int, why: str) -> Path:
    """Give a checkpoint a name under which it is no longer used, such as `damaged-1200`; returns it."""
    target, number = folder / f"{why}-{step}", 2
    while target.exists():
        target, number = folder / f"{why}-{step}-{number}", number + 1
    (folder / str(step)).rename(target)
    return target


def remove_unfinished(folder: Path) -> None:
    """Delete what is left of checkpoints that were never whole; nothing may be saving."""
    for path in folder.iterdir():
        if _UNFINISHED in path.name:
            shutil.rmtree(path, ignore_errors=True)


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def words(size: float) -> str:
    """A number of bytes, for people."""
    power = 0 if size < 1024 else min(int(math.log(size, 1024)), 3)
    return f"{size / 1024**power:,.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def free(folder: Path) -> str:
    """How many bytes can be written to a folder, for people."""
    try:
        return words(shutil.disk_usage(folder).free)
    except OSError:
        return "unknown amounts"
