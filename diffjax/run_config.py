"""The configuration that is kept beside a run, as JSON, and what a later one may change."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax.errors import UserError

FILE = "config.json"

# Keys that may differ when a run is resumed: they change what is seen or where, not what is learnt.
FREE_KEYS: tuple[str, ...] = ("log_every", "mesh", "attention", "accumulate", "optimizer.offload")
FREE_KEYS += ("checkpoint", "preview", "data.cache_dir", "data.num_threads")


def to_json(config: ConfigDict) -> str:
    """The resolved configuration as JSON."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True) + "\n"


def load(workdir: Path) -> ConfigDict:
    """The configuration that is kept in a working directory.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = workdir / FILE
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return ConfigDict(_tuples(values))
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no run: there is no {FILE} in it.") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


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
        if any(key == name or key.startswith(name + ".") for name in free):
            continue
        was, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if was != now:
            lines.append(f"  {key}: {was!r} there, {now!r} now")
    return lines


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
