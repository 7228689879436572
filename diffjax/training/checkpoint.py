"""Checkpoints of a run, by Orbax: the only file that knows it.

A checkpoint has five items: `params`, `ema_params` (all that sampling reads), `rest` (optimizer, step and
loss history), `data` (the loader's position) and `manifest` (digests and configuration). Orbax writes into a
temporary folder and renames it when it is whole, so a process killed while saving leaves the older
checkpoints as they were. Then the first process seals it, see `manifest`, and only then deletes those that
are not kept.

What is restored is compared with the digests. A damaged checkpoint is renamed, and the one before it is used.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import run_config
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.training import archive, digests, keeping, manifest
from diffjax.training.manifest import DamageError
from diffjax.training.state import TrainState

FOLDER = "checkpoints"

SAVE_SECONDS = 1200
"""After how long a save counts as failed because one of several processes has not written its part."""


def warn(message: str) -> None:
    """Say something that must not be overlooked."""
    print(message, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints below a working directory.

    With several processes, each calls the same methods in the same order.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep.
      keep_every: keep each of whose number of steps this is a divisor, too; 0: none.
      keep_best: keep so many of the least loss, too.
      config: of the run; it is written with each checkpoint, and one of another configuration is refused.
      log: told of damage and of saves that failed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        config: ConfigDict | None = None,
        log: Callable[[str], None] = warn,
    ) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = workdir.absolute() / FOLDER
        self._keep = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}
        self._config, self._log = config, log
        self._failure: UserError | None = None
        self._reported = True
        self._writing: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # Orbax would fail at the first save only
            waits = ocp.AsyncOptions(timeout_secs=SAVE_SECONDS)
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=waits)
        except OSError as error:
            raise UserError(
                f"cannot keep checkpoints in {self._folder}: {error.strerror or error}."
            ) from error

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints on disk, rising."""
        return keeping.steps_in(self._folder)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return max(self.steps(), default=None)

    @property
    def failed(self) -> bool:
        """Whether the newest save, as far as it is known in this process, has failed."""
        return self._failure is not None

    def save(self, state: TrainState, data_state: dict[str, Any], *, loss: float | None = None) -> None:
        """Start saving; the files are written in the background.

        A save that fails is told to `log`, here or later, and leaves the older checkpoints; see `failed`.

        Args:
          state: may be donated afterwards.
          data_state: the loader's position, as JSON can hold it.
          loss: by which the best are kept.
        """
        self._settle()
        step = int(state.step)
        if step in self.steps():
            return
        items = {"params": state.params, "ema_params": state.ema_params, "rest": _rest(state)}
        arrays = {
            item: manifest.describe(digests.flatten(tree), digests.of_tree(tree))
            for item, tree in items.items()
        }
        self._write(step, items, arrays, data_state, loss)

    def copy(self, folder: Path) -> None:
        """Write the checkpoint in `folder` anew: whole arrays, in the files of this process alone.

        Raises:
          UserError: it is damaged, or cannot be written.
        """
        body = archive.sound_manifest(folder)
        items = {item: archive.read_arrays(folder, item) for item in manifest.ARRAYS}
        position = archive.read_position(folder, body)
        self._write(body["step"], items, body["arrays"], position, body["loss"], body["config"])
        self.wait()

    def restore(
        self, abstract: TrainState, *, before: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read the newest sound checkpoint; damaged ones that are newer are renamed, and `log` is told.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` with the shardings to restore to.
          before: the newest step that will do; any, if it is None.

        Returns:
          the state, and the loader's position.

        Raises:
          UserError: there is no sound checkpoint, or it is of another configuration or network.
        """
        self._settle()
        trees = {"params": abstract.params, "ema_params": abstract.ema_params, "rest": _rest(abstract)}
        found: dict[int, DamageError] = {}
        for step in reversed([step for step in self.steps() if before is None or step <= before]):
            try:
                items = self._read(step, trees, data=self._ocp.args.JsonRestore())
            except DamageError as error:
                found[step] = error
                continue
            # Only now: a run must not start anew because all are damaged.
            for damaged, problem in found.items():
                self._tell(
                    f"warning: the checkpoint of step {damaged} in {self._folder} is damaged: {problem}.\n"
                    f"It is kept as {self._put_away(damaged, keeping.DAMAGED)}; that of step {step} is used."
                )
            state = TrainState(params=items.params, ema_params=items.ema_params, **items.rest)
            return state, items.data
        raise archive.nothing_sound(self._folder, found, before)

    def restore_ema(self, abstract: Any) -> Any:
        """Read only the averaged parameters of the newest checkpoint; nothing on disk is changed.

        Raises:
          UserError: there is no checkpoint, or the newest is damaged or of another network.
        """
        step = self.latest_step()
        if step is None:
            raise archive.nothing_sound(self._folder, {}, None)
        try:
            return self._read(step, {"ema_params": abstract}).ema_params
        except DamageError as error:
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} is damaged: {error}.\n"
                f"If you move {self.folder(step)} away, the one before it is used."
            ) from error

    def set_aside(self, *, after: int) -> None:
        """Rename checkpoints of later steps, which a run that goes back to step `after` leaves behind."""
        self._settle()
        for step in [step for step in self.steps() if step > after]:
            where = self._put_away(step, keeping.LEFT)
            self._tell(f"the checkpoint of step {step} is left behind as {where}.")

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._folder / str(step)

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          UserError: the newest checkpoint could not be written; it is said once.
        """
        self._settle()
        if self._failure is not None and not self._reported:
            self._reported = True
            raise self._failure

    def close(self) -> None:
        """Wait, and let go of threads.

        Raises:
          UserError: see `wait`.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    # Writing.

    def _write(
        self,
        step: int,
        items: dict[str, Any],
        arrays: dict[str, Any],
        data_state: Any,
        loss: float | None,
        config: dict[str, Any] | None = None,
    ) -> None:
        args = self._ocp.args
        if config is None and self._config is not None:
            config = json.loads(run_config.to_json(self._config))
        about = manifest.make(step, arrays, data_state, config, loss)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        # The next update donates the state's buffers. On the CPU Orbax would read them from where they are,
        # in the background; elsewhere it copies them to the host before it returns.
        if jax.default_backend() == "cpu":
            items = jax.block_until_ready(jax.tree.map(lambda leaf: leaf.copy(), items))
        saves = {item: args.StandardSave(tree) for item, tree in items.items()}
        json_saves = {"data": args.JsonSave(data_state), manifest.ITEM: args.JsonSave(about)}
        self._failure = None
        try:
            if hosts.is_first():
                keeping.remove_unfinished(self._folder)
            self._orbax.save(self.folder(step), args=args.Composite(**saves, **json_saves))
        except Exception as error:  # Orbax and TensorStore raise many kinds for one full disk
            # In the background, too: several processes are to find the same calls under way.
            self._writing = self._background.submit(self._fail, step, size, error)
        else:
            self._writing = self._background.submit(self._finish, step, size)

    def _finish(self, step: int, size: int) -> None:
        """What follows a save, in the background."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            self._fail(step, size, error)
            return
        try:
            if hosts.is_first():
                manifest.write_seal(self.folder(step))
                archive.prune(self._folder, **self._keep)
        except OSError as error:
            self._log(f"warning: after the checkpoint of step {step}, in {self._folder}: {error}.")

    def _settle(self) -> None:
        """Wait for the save that is under way; all processes learn of a failure in any."""
        if self._writing is None:
            return
        self._writing.result()
        self._writing = None
        if hosts.anywhere(np.array([self.failed]))[0] and not self.failed:
            self._failure = UserError(f"another process could not write a checkpoint to {self._folder}.")
            self._reported = False

    def _fail(self, step: int, size: int, error: Exception) -> None:
        self._failure = archive.not_saved(self._folder, step, size, error)
        self._reported = False
        self._log(f"warning: {self._failure}")
        if hosts.is_first():  # what Orbax's threads still write after this, the next save removes
            with contextlib.suppress(OSError):
                keeping.remove_unfinished(self._folder)

    # Reading.

    def _read(self, step: int, trees: dict[str, Any], **further: Any) -> Any:
        """Read and verify items of a checkpoint.

        Raises:
          DamageError: it is not as it was written; in all processes, if in any.
          UserError: it is sound, and does not fit.
        """
        folder, args = self.folder(step), self._ocp.args
        body = self._together(lambda: manifest.read(folder))
        if body is None:
            self._tell(f"warning: the checkpoint {folder} is from before there were digests; not verified.")
        else:
            arrays = {item: digests.flatten(tree) for item, tree in trees.items()}
            archive.check_fit(folder, body, self._config, arrays)
        parts = (*trees, *further, manifest.ITEM) if "rest" not in trees else ()
        self._together(lambda: manifest.check_seal(folder, parts) if hosts.is_first() else None)
        restores = {item: args.StandardRestore(tree) for item, tree in trees.items()}
        items = self._together(lambda: self._restore(folder, args.Composite(**restores, **further)))
        if body is not None:
            problems = []
            for item in trees:
                problems += manifest.damaged_arrays(body, item, digests.of_tree(items[item]))
            if problems:
                raise DamageError(archive.listed(problems))
            if "data" in further and manifest.sha256(items.data) != body["data"]:
                raise DamageError("the loader's position (data) is not as it was written")
        return items

    def _together(self, action: Callable[[], Any]) -> Any:
        """Run an action in each process; if it finds damage in one, all say so."""
        result = problem = None
        try:
            result = action()
        except DamageError as error:
            problem = error
        if hosts.anywhere(np.array([problem is not None]))[0]:
            raise problem or DamageError("another process found it to be so")
        return result

    def _restore(self, folder: Path, args: Any) -> Any:
        try:
            return self._orbax.restore(folder, args=args)
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) or manifest.is_sealed(folder):
                # The files are as they were written: the cause is elsewhere, such as too little memory.
                raise UserError(
                    f"the checkpoint {folder} cannot be read: {archive.reason(error)}."
                ) from error
            raise DamageError(archive.reason(error)) from error

    def _tell(self, message: str) -> None:
        if hosts.is_first():  # it knows the same as the others
            self._log(message)

    def _put_away(self, step: int, why: str) -> str:
        """Rename a checkpoint, in the first process; returns the new name."""
        where = f"{why}-{step}"
        if hosts.is_first():
            try:
                where = keeping.put_away(self._folder, step, why).name
            except OSError as error:
                raise UserError(f"cannot rename {self.folder(step)}: {error.strerror}.") from error
        hosts.wait(f"{why} {step}")
        return where


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "history": state.history}
