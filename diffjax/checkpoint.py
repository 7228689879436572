"""Mode `checkpoint`: what a run has saved is listed, verified, exported, averaged or copied.

It needs no configuration file, since each checkpoint holds its own as JSON, and no accelerator. A run that is
being trained can be looked at; nothing in it is changed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

import diffjax
from diffjax import run_config
from diffjax.errors import UserError
from diffjax.interop.store import Store, write_store
from diffjax.training import archive, digests, ema, keeping, manifest
from diffjax.training.checkpoint import FOLDER, Checkpoints
from diffjax.untrusted import read_json

WEIGHTS = {"ema": "ema_params", "params": "params"}


def checkpoint(
    workdir: Path,
    action: str,
    *,
    step: int | None = None,
    output: Path | None = None,
    weights: str = "ema",
    sigma_rel: float | None = None,
) -> None:
    """Do what `action` says with the checkpoints of a run.

    Args:
      workdir: the run's directory.
      action: a key of `ACTIONS`.
      step: of the checkpoint; None: the newest, and for "verify" all.
      output: the folder that is written, where one is.
      weights: a key of `WEIGHTS`, for "export".
      sigma_rel: the width of the average, for "average"; see `diffjax.training.ema`.

    Raises:
      UserError: a checkpoint is damaged or missing, or what is given does not fit.
    """
    jax.config.update("jax_platforms", "cpu")  # a run may have the accelerator
    folder = workdir.absolute() / FOLDER
    steps = keeping.steps_in(folder)
    if not steps:
        raise UserError(f"there is no checkpoint in {folder}{_hint(workdir)}.")
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: there are checkpoints of the steps {_numbers(steps)} in {folder}.")
    if action == "list":
        show(folder)
    elif action == "verify":
        verify(folder, steps if step is None else [step])
    elif output is None:
        raise UserError(f"--action={action} writes a folder: give --output=FOLDER.")
    elif (output / FOLDER).exists():
        raise UserError(f"--output={output} holds a run already; choose another folder.")
    elif action == "average":
        average(folder, steps, steps[-1] if step is None else step, output, sigma_rel)
    else:
        ACTIONS[action](folder / str(steps[-1] if step is None else step), output, weights)


def show(folder: Path) -> None:
    """Print a line for each checkpoint in a folder."""
    print(f"{'step':>9}  {'saved (UTC)':19}  {'size':>10}  {'loss':>9}  {'config':8}  state")
    for step in keeping.steps_in(folder):
        path = folder / str(step)
        try:
            body, state = manifest.read(path), "sealed" if manifest.is_sealed(path) else "not sealed"
        except manifest.DamageError as error:
            body, state = None, f"damaged: {error}"
        body = body or {"saved": "", "loss": None, "config": None}
        loss = "" if body["loss"] is None else f"{body['loss']:.5g}"
        config = manifest.sha256(body["config"])[:8] if body["config"] else ""
        size, saved = keeping.words(keeping.size_of(path)), body["saved"][:19].replace("T", " ")
        print(f"{step:>9}  {saved:19}  {size:>10}  {loss:>9}  {config:8}  {state}")
    for path in sorted(folder.glob("*-*")):
        if path.name.startswith((keeping.DAMAGED, keeping.LEFT)):
            print(f"{path.name}: {keeping.words(keeping.size_of(path))}, not used")


def verify(folder: Path, steps: list[int]) -> None:
    """Compare files and arrays of checkpoints with what was written down of them.

    Raises:
      UserError: something differs.
    """
    damaged = 0
    for step in steps:
        path = folder / str(step)
        problems = archive.verify(path)
        damaged += bool(problems)
        if not problems and manifest.read(path) is None:
            print(f"step {step}: from before there were digests; not verified")
        elif not problems:
            print(f"step {step}: sound{'' if manifest.is_sealed(path) else ' (not sealed: arrays only)'}")
        for problem in problems:
            print(f"step {step}: damaged: {problem}")
    if damaged:
        raise UserError(f"{damaged} of {len(steps)} checkpoints in {folder} are damaged; see above.")


def export(path: Path, output: Path, weights: str) -> None:
    """Write the parameters of a checkpoint as safetensors, with a config.json beside them."""
    body = archive.sound_manifest(path, (WEIGHTS[weights], manifest.ITEM))
    params = archive.read_arrays(path, WEIGHTS[weights])
    _write(output, params, body, weights=weights)


def average(folder: Path, steps: list[int], step: int, output: Path, sigma_rel: float | None) -> None:
    """Write the power-function average of another width, as the snapshots of a run come closest to it.

    Args:
      folder: of the checkpoints.
      steps: those that may be used; later ones than `step` are not.
      step: at which the average is taken.
      output: the folder that is written.
      sigma_rel: the average's width relative to `step`.

    Raises:
      UserError: the run kept no power-function average, or the width is impossible.
    """
    if sigma_rel is None:
        raise UserError("--action=average wants the width of the average: give --sigma_rel=0.1, say.")
    used = [number for number in steps if number <= step]
    bodies = [archive.sound_manifest(folder / str(n), ("ema_params", manifest.ITEM)) for n in used]
    kinds = [(body["config"] or {}).get("ema", {}) for body in bodies]
    if any(kind.get("name") != "power_function" for kind in kinds):
        raise UserError(
            f"the averages in {folder} are not of config.ema.name='power_function', from which alone others "
            "can be reconstructed; export them as they are with --action=export."
        )
    try:
        gammas = np.array([ema.gamma_of(kind.get("sigma_rel", ema.SIGMA_REL)) for kind in kinds])
        target = ema.gamma_of(sigma_rel)
    except ValueError as error:
        raise UserError(f"--sigma_rel: {error}.") from error
    weights = ema.reconstruction_weights(np.array(used), gammas, step, target)
    misfit = ema.reconstruction_error(np.array(used), gammas, weights, step, target)
    trees = (archive.read_arrays(folder / str(number), "ema_params") for number in used)
    _write(output, ema.reconstruct(trees, weights), bodies[-1], weights=f"average of sigma_rel {sigma_rel}")
    print(
        f"The average of width {sigma_rel} at step {step:,} from {len(used)} snapshots: the profile of its "
        f"weights over time differs from the true one by {100 * misfit:.2g} % (root of the squares)."
    )


def reshard(path: Path, output: Path, _: str) -> None:
    """Write a checkpoint anew as a run that any mesh goes on with: whole arrays, in one process's files."""
    body = archive.sound_manifest(path)
    copies = Checkpoints(output)
    try:
        copies.copy(path)
    finally:
        copies.close()
    if body["config"] is not None:
        run_config.keep(run_config.from_dict(body["config"]), output, started=False)
    print(f"The checkpoint of step {body['step']:,} is written to {output}; train there to go on from it.")


def read_export(folder: Path) -> tuple[ConfigDict, Any]:
    """The configuration of the stage and the parameters that `export` or `average` wrote.

    Returns:
      the configuration, and nested dictionaries of numpy arrays as the stage's network takes them.

    Raises:
      UserError: the folder is none of these.
    """
    config = read_json(folder / "config.json").get("config")
    if not isinstance(config, dict):
        raise UserError(f"{folder}: its config.json is none that --mode=checkpoint wrote.")
    with Store(folder) as store:
        params = {name: store.read(name) for name in store.names()}
    return run_config.from_dict(config), unflatten_dict(params, sep="/")


def _write(output: Path, params: Any, body: Mapping[str, Any], *, weights: str) -> None:
    config = {
        "_class_name": "diffjax",
        "diffjax": diffjax.__version__,
        "step": body["step"],
        "weights": weights,
        "config": body["config"],
    }
    tensors = digests.flatten(params)
    write_store(output, tensors, stem="model", config=config)
    count = sum(tensor.size for tensor in tensors.values())
    print(f"{count:,} parameters ({weights}) of step {body['step']:,} are written to {output}.")


def _hint(workdir: Path) -> str:
    runs = sorted(str(path.parent) for path in workdir.glob(f"*/{FOLDER}"))
    return f"; --workdir may be {' or '.join(runs)}" if runs else ""


def _numbers(steps: list[int]) -> str:
    return ", ".join(str(step) for step in steps)


ACTIONS: dict[str, Callable[..., None]] = {
    "list": show,
    "verify": verify,
    "export": export,
    "average": average,
    "reshard": reshard,
}
