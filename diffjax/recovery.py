"""Going back to a checkpoint when the numbers of a run went wrong, and the report when that does not help."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.feed import Feed, Taken
from diffjax.parallel import hosts
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.diagnosis import Diagnosis
from diffjax.training.watch import Trouble

FILE = "rollbacks.jsonl"

_NAMED = 8


def rollbacks(workdir: Path) -> list[dict[str, Any]]:
    """How often a run has gone back, and why; oldest first.

    Returns:
      of each time: `step` and `why` of the trouble, `restored`, the step of the checkpoint that it went back
      to, and `position`, from where in the data it went on.

    Raises:
      UserError: the file cannot be read.
    """
    path = workdir / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line, from the moment the process was killed
            entry = json.loads(line)
            if isinstance(entry, dict) and {"step", "restored", "position"} <= entry.keys():
                entries.append(entry)
    return entries


def position_after(workdir: Path, step: int, position: dict[str, Any]) -> dict[str, Any]:
    """Where in the data a run goes on from the checkpoint of `step`, which says `position`.

    A run that has gone back to that checkpoint leaves out the data with which it had gone wrong, also when it
    is interrupted afterwards.
    """
    beyond = [entry["position"] for entry in rollbacks(workdir) if entry["restored"] == step]
    return {**position, **beyond[-1]} if beyond else position


def go_back(
    trouble: Trouble,
    *,
    workdir: Path,
    checkpoints: Checkpoints,
    feed: Feed,
    abstract: Any,
    say: Callable[[str], None],
) -> tuple[Any, dict[str, Any], int]:
    """Restore the newest checkpoint of before the trouble; the data up to the trouble's end are left out.

    Returns:
      the state, what else the checkpoint holds (see `diffjax.run.Run`), and its step.

    Raises:
      UserError: there is no sound checkpoint as old as that.
    """
    position = feed.taken(trouble.last).after
    state, saved = checkpoints.restore(abstract, before=trouble.first - 1)
    step = int(state.step)
    checkpoints.set_aside(after=step)
    entry = {"step": trouble.first, "why": trouble.why, "restored": step, "position": position}
    if hosts.is_first():
        path = workdir / FILE
        # Written anew, because after the half line of a process that was killed an entry would be lost.
        lines = "".join(json.dumps(each) + "\n" for each in [*rollbacks(workdir), entry])
        try:
            path.with_suffix(".tmp").write_text(lines, encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    hosts.wait("the rollback's record")
    feed.go_to(position)
    say(
        f"warning: from update {trouble.first:,} on {trouble.why}. Gone back to the checkpoint of step "
        f"{step:,}; the data up to update {trouble.last:,} are left out. Written down in {workdir / FILE}."
    )
    return state, saved, step


def report(
    trouble: Trouble,
    taken: Taken,
    diagnosis: Diagnosis | None,
    source: Source,
    *,
    workdir: Path,
    times: int,
    good: int | None,
) -> str:
    """Say what went wrong, in full in a file of `workdir` and briefly in what is returned.

    Args:
      trouble: what it was.
      taken: the batch of its first update.
      diagnosis: of that update; None if there were numbers.
      source: where the examples come from.
      workdir: the run's.
      times: how often the run had gone back.
      good: the step of the newest checkpoint of before the trouble; None if there is none.
    """
    places = _everywhere(taken.places)
    keys = [source.keys[i] for i in places]
    bad = [keys[row] for row in (diagnosis.rows if diagnosis else []) if row < len(keys)]
    written = {
        "step": trouble.first,
        "why": trouble.why,
        "went back": times,
        "first not finite": diagnosis.where if diagnosis else "",
        "examples without a finite loss": bad,
        "examples of the batch": keys,
        "their places in the data": places.tolist(),
        "captions": [source.captions[i] for i in places],
    }
    path = workdir / f"trouble-{trouble.first}.json"
    if hosts.is_first():
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = bad or keys
    names = ", ".join(shown[:_NAMED]) + (", …" if len(shown) > _NAMED else "")
    where = f" The first that is not finite: {diagnosis.where}." if diagnosis and diagnosis.where else ""
    kept = "there is no checkpoint of before" if good is None else f"the checkpoint of step {good:,} is good"
    again = f", after having gone back {times} times (recovery.max_rollbacks)" if times else ""
    return (
        f"from update {trouble.first:,} on {trouble.why}{again}.{where}\n"
        f"Examples of that update: {names}. All of this is in {path}; {kept}.\n"
        "Try a lower optimizer.learning_rate or a smaller optimizer.clip_norm, or look at those examples."
    )


def _everywhere(places: np.ndarray) -> np.ndarray:
    """The whole batch's places, of which each process read a part."""
    if jax.process_count() == 1:
        return places
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(places, tiled=True)
