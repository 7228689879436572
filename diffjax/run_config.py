"""The configuration that is kept beside a run, as JSON, and what a later one may change."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax.check_config import check_types
from diffjax.config import stage_config
from diffjax.errors import UserError, brief
from diffjax.untrusted import read_json

FILE = "config.json"
_MAX_BYTES = 2**20

# Keys that may differ when a run is resumed: they change what is seen or where, not what is learnt.
FREE_KEYS: tuple[str, ...] = ("log_every", "mesh", "attention", "accumulate", "optimizer.offload")
FREE_KEYS += ("checkpoint", "recovery", "preview", "eval")
FREE_KEYS += ("data.cache_dir", "data.num_threads", "data.max_rejects")


def to_json(config: ConfigDict) -> str:
    """The resolved configuration as JSON."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True) + "\n"


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """A configuration from what `to_json` says."""
    return ConfigDict(_tuples(values))


def load(workdir: Path) -> ConfigDict:
    """The stage's configuration that is kept in a working directory, which may be a stranger's.

    Further keys are data like others; nothing is run. Missing keys get their defaults if they change nothing
    that is learnt, for they may be newer than the run.

    Raises:
      UserError: there is none, it cannot be read, or a value is missing or of another type than it should be.
    """
    path = workdir / FILE
    if not path.exists():
        raise UserError(f"{workdir} holds no run: there is no {FILE} in it.")
    try:
        config = from_dict(read_json(path, _MAX_BYTES))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # keys that none can have
        raise UserError(f"{path} cannot be read: {brief(error)}.") from error
    check_types(config, stage_config(), missing=_told_of_missing, where=f"{path}: ")
    return config


def keep(config: ConfigDict, workdir: Path, *, started: bool) -> None:
    """Write the configuration into a working directory, after comparing it with the one that is there.

    Args:
      config: the configuration.
      workdir: the working directory.
      started: whether there is a checkpoint, which another configuration would contradict.

    Raises:
      UserError: the run there was started with another configuration; the difference is shown.
    """
    path = workdir / FILE
    if started and path.exists():
        changes = difference(load(workdir), config)
        if changes:
            shown = "\n".join(changes[:8]) + ("\n…" if len(changes) > 8 else "")
            raise UserError(
                f"{workdir} holds a run with another configuration:\n{shown}\n"
                "Go on with the same values, or choose another --workdir."
            )
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(to_json(config), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What contradicts between two configurations, as lines `key: old -> new`; free keys do not count."""
    before, after = _flat(json.loads(to_json(old))), _flat(json.loads(to_json(new)))
    free = list(FREE_KEYS)
    if before.get("optimizer.decay") == after.get("optimizer.decay") == "constant":
        free.append(
            "steps"
        )  # a decaying learning rate depends on the length of the run, a constant one does not
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if _is_free(key, free):
            continue
        was, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if was != now:
            lines.append(f"  {key}: {was!r} there, {now!r} now")
    return lines


def _told_of_missing(key: str) -> str | None:
    """What is wrong with a kept configuration that lacks a key; None: nothing, it changes nothing learnt."""
    if _is_free(key, (*FREE_KEYS, "data")):
        return None
    return f"has no {key}; it is damaged, or of another version of diffjax."


def _is_free(key: str, free: Iterable[str]) -> bool:
    """Whether a key is one of these, or a part of one."""
    return any(key == name or key.startswith(name + ".") for name in free)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which is what configurations hold."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    return value
