"""Mode `plan`: what a configuration asks of chips, before any is paid for.

The real train step, or the sampler, is compiled for devices of this machine or for TPUs and GPUs that are not
there; nothing is run and no parameter exists. What is printed is what the compiler says of memory, what the
program sends between chips, and a bound on its speed.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax import run_config
from diffjax.errors import UserError
from diffjax.estimate import Plan, measure, report, to_dict
from diffjax.parallel.mesh import batch_parts, make_mesh
from diffjax.parallel.topologies import topology_devices
from diffjax.pretrained import adopt, adopt_sampler
from diffjax.programs import Program, sample_program, train_program

Make = Callable[[Mesh, int], Program]
"""`(mesh, batch) -> program`; a batch of 0 is the configuration's."""

MAX_COMPILES = 9  # of a search for the largest batch; its first guess is off by a few percent


def plan(
    config: ConfigDict,
    workdir: Path,
    *,
    topology: str = "",
    program: str = "train",
    batch: str = "",
    as_json: bool = False,
) -> None:
    """Plan a stage, or the stages of a cascade, and print what comes out.

    Args:
      config: the configuration.
      workdir: of a cascade whose stages were trained.
      topology: devices that are not there, such as "v5e:4x4" or "h100:8"; "": the devices of this machine.
      program: "train" or "sample".
      batch: over all devices, or "auto" for the largest that fits; "": the configuration's.
      as_json: print JSON and nothing else.

    Raises:
      UserError: the configuration does not fit the devices, or the compiler refuses it for other reasons than
        its size.
    """
    if batch not in ("", "auto") and not batch.isdecimal():
        raise UserError(f"--batch={batch}: expected a number, or auto.")
    devices = topology_devices(topology) if topology else jax.devices()
    plans = []
    for make, own in programs(config, workdir, program):
        where = make_mesh(**own.mesh, devices=devices)
        found = largest(make, where) if batch == "auto" else measure(make(where, int(batch or 0)), where)
        plans.append(found)
        if not as_json:
            print(report(found), flush=True)
    if as_json:
        print(json.dumps([to_dict(each) for each in plans], indent=2))


def programs(config: ConfigDict, workdir: Path, program: str) -> list[tuple[Make, ConfigDict]]:
    """The programs of a configuration, each with the part of it that holds its mesh."""
    if not configs.is_cascade(config):
        own = adopt(config)
        if program == "train":
            return [(lambda mesh, batch: train_program(own, mesh, batch=batch), own)]
        settings = adopt_sampler(own.preview.sampler, own)
        return [(lambda mesh, batch: sample_program(own, mesh, settings, batch=batch or own.batch_size), own)]
    if program == "train":
        stages = {name: entry.train for name, entry in config.stages.items() if "train" in entry}
        if not stages:
            raise UserError(
                "this cascade brings no stages to train: plan the configuration of each, or give "
                "--program=sample."
            )
        return [(_trainer(name, own), own) for name, own in stages.items()]
    return [(_sampler(config, name, workdir), config) for name in config.stages]


def _trainer(name: str, config: ConfigDict) -> Make:
    return lambda mesh, batch: train_program(config, mesh, batch=batch, name=f"train {name}")


def _sampler(config: ConfigDict, name: str, workdir: Path) -> Make:
    """Sampling of a cascade's stage, whose configuration is in it, beside its run, or in public weights."""
    entry = config.stages[name]
    if "train" in entry:
        stage = adopt(entry.train)
    elif entry.workdir:
        stage = run_config.load(Path(entry.workdir).expanduser())
    else:
        stage = configs.stage_config()
        stage.update(entry.get("public", ConfigDict()))
        stage = adopt(stage)
    settings = adopt_sampler(entry.sampler, stage)

    def make(mesh: Mesh, batch: int) -> Program:
        batch = batch or config.batch_size
        return sample_program(stage, mesh, settings, batch=batch, name=f"sample {name}")

    return make


def largest(make: Make, mesh: Mesh) -> Plan:
    """The plan of the largest batch that fits, to about 3 %; or of one image a part, if that does not fit.

    Memory grows about linearly with the batch: two compilations give a guess, the next ones correct it.
    """
    parts = batch_parts(mesh)
    tried: dict[int, Plan] = {}

    def fits(count: int) -> bool:
        tried[count] = measure(make(mesh, count * parts), mesh)
        return tried[count].fits

    if not fits(1):
        return tried[1]
    low, high = 1, 0
    if fits(4):
        low = 4
    else:
        high = 4
    while len(tried) < MAX_COMPILES and (not high or high - low > max(1, low // 32)):
        guess = _guess(tried, low)
        if high and not low < guess < high:
            guess = (low + high) // 2
        elif not high:
            guess = max(low + 1, min(guess, 8 * low))
        low, high = (guess, high) if fits(guess) else (low, guess)
    found = tried[low]
    edge = f"{high * parts:,} does not fit" if high else "larger ones were not tried"
    note = f"the largest batch in {len(tried)} compilations; {edge}."
    return dataclasses.replace(found, notes=(*found.notes, note))


def _guess(tried: dict[int, Plan], low: int) -> int:
    """What would just fit, by a line through the two batches of known need that are nearest; 0: unknown."""
    known = sorted((abs(count - low), count, each.needed) for count, each in tried.items() if each.needed)[:2]
    if len(known) < 2:
        return 0
    (_, a, need_a), (_, b, need_b) = known
    slope = max((need_b - need_a) / (b - a), 1.0)
    # What the compiler says it has, which is a little less than the chip's whole memory, if it has said so.
    limit = min(each.limit for each in tried.values())
    return int(a + (limit - need_a) / slope)
