"""The ways of sampling that are compared: the configured one, and those of `config.evaluate.sweep`."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.cascade import Cascade, TrainedStage, stage_workdir
from diffjax.config import nearest
from diffjax.errors import UserError
from diffjax.experiment import build_sampler, check_sampler
from diffjax.pretrained import adopt_sampler
from diffjax.training import archive, ema
from diffjax.training.checkpoint import FOLDER

CONFIGURED = "as configured"
SWEPT = ("guidance_scale", "num_steps", "solver", "aug_level", "sigma_rel")


class Variant(NamedTuple):
    """One way of sampling.

    Attributes:
      name: what is different about it.
      changes: the settings that differ from the configured ones.
      cascade: the stages with these settings.
      samplers: the settings of each stage, as JSON has them.
    """

    name: str
    changes: dict[str, Any]
    cascade: Cascade
    samplers: dict[str, Any]


def up_to(cascade: Cascade, stage: str) -> Cascade:
    """The cascade without the stages that come after `stage`; "": all of it.

    Raises:
      UserError: there is no such stage.
    """
    if not stage:
        return cascade
    return dataclasses.replace(cascade, stages=cascade.stages[: _place(cascade, stage, "evaluate.stage") + 1])


def variants(config: ConfigDict, cascade: Cascade, workdir: Path) -> list[Variant]:
    """The configured way of sampling first, then the others, each once.

    Raises:
      UserError: a setting cannot be, or has no effect.
    """
    sweep = config.evaluate.sweep
    place = _place(cascade, sweep.stage, "evaluate.sweep.stage") if sweep.stage else 0
    item = cascade.stages[place]
    given = {key: tuple(sweep[key]) for key in SWEPT if len(sweep[key])}
    if "aug_level" in given and not item.stage.low_res:
        raise UserError(
            f"evaluate.sweep.aug_level: stage {item.name!r} starts from no images; set evaluate.sweep.stage."
        )
    if sweep.product:
        chosen = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    else:
        chosen = [{key: value} for key, values in given.items() for value in values]
    samplers = {stage.name: config.stages[stage.name].sampler for stage in cascade.stages}
    configured = {name: json.loads(entry.to_json_best_effort()) for name, entry in samplers.items()}
    found = [Variant(CONFIGURED, {}, cascade, configured)]
    for changes in chosen:
        changed, told = _changed(config, item, changes, workdir)
        if told in (variant.samplers[item.name] for variant in found):
            continue
        stages = (*cascade.stages[:place], changed, *cascade.stages[place + 1 :])
        name = ", ".join(f"{key}={value}" for key, value in changes.items())
        prefix = f"{item.name}: " if len(cascade.stages) > 1 else ""
        found.append(
            Variant(
                prefix + name,
                changes,
                dataclasses.replace(cascade, stages=stages),
                {**configured, item.name: told},
            )
        )
    return found


def _changed(
    config: ConfigDict, item: TrainedStage, changes: dict[str, Any], workdir: Path
) -> tuple[TrainedStage, dict[str, Any]]:
    """A stage with another sampler, and that sampler's settings as JSON has them."""
    sampler = ConfigDict(json.loads(config.stages[item.name].sampler.to_json_best_effort()))
    for key, value in changes.items():
        if key == "solver":
            sampler.solver = ConfigDict({"name": value})
        elif key != "sigma_rel":
            sampler[key] = type(sampler[key])(value)
    told = json.loads(sampler.to_json_best_effort())
    settings = build_sampler(adopt_sampler(sampler, item.config), "evaluate.sweep")
    check_sampler(item.stage, settings, "evaluate.sweep")
    item = dataclasses.replace(item, settings=settings)
    if "sigma_rel" in changes:
        told["sigma_rel"] = changes["sigma_rel"]
        folder = stage_workdir(config, item.name, workdir) / FOLDER
        item = dataclasses.replace(item, params=_averaged(folder, item, float(changes["sigma_rel"])))
    return item, told


def _averaged(folder: Path, item: TrainedStage, sigma_rel: float) -> Any:
    """Parameters averaged with another width, from the snapshots of a run (Karras et al., 2024)."""
    kind = item.config.ema
    if kind.name != "power_function":
        raise UserError(
            f"evaluate.sweep.sigma_rel: stage {item.name!r} was trained with ema.name={kind.name!r}; other "
            "averages can be reconstructed from 'power_function' alone."
        )
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    used = np.array([step for step in steps if step <= item.step])
    try:
        gammas = np.full(len(used), ema.gamma_of(kind.get("sigma_rel", ema.SIGMA_REL)))
        weights = ema.reconstruction_weights(used, gammas, item.step, ema.gamma_of(sigma_rel))
    except ValueError as error:
        raise UserError(f"evaluate.sweep.sigma_rel: {error}.") from error
    trees = (archive.read_arrays(folder / str(step), "ema_params") for step in used)
    average = ema.reconstruct(trees, weights)
    return jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), average, item.params
    )


def _place(cascade: Cascade, name: str, key: str) -> int:
    names = [item.name for item in cascade.stages]
    if name not in names:
        raise UserError(f"{key}={name!r} does not exist; {nearest(name, names)}")
    return names.index(name)
