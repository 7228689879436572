"""Checkpoints of a run, by Orbax: the only file that knows it.

A checkpoint has four items: `params`, `ema_params` (all that sampling reads), `rest` (optimizer, step and
loss history) and `data` (the loader's position). Orbax writes into a temporary folder and renames it when it
is whole, so a process killed while saving leaves the older checkpoints as they were.
"""

import re
from pathlib import Path
from typing import Any

import jax

from diffjax.errors import UserError
from diffjax.training.state import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints below a working directory.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep.
    """

    def __init__(self, workdir: Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = workdir.absolute() / FOLDER
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # Orbax would fail at the first save only
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_names=("params", "ema_params", "rest", "data"),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            )
        except OSError as error:
            raise UserError(
                f"cannot keep checkpoints in {self._folder}: {error.strerror or error}."
            ) from error

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Start saving; the files are written in the background.

        Raises:
          UserError: this or the previous checkpoint could not be written.
        """
        args, step = self._ocp.args, int(state.step)
        if step == self.latest_step():
            return
        # The next update donates the state's buffers. On the CPU Orbax would read them from where they are,
        # in the background; elsewhere it copies them to the host before it returns.
        if jax.default_backend() == "cpu":
            state = jax.block_until_ready(jax.tree.map(lambda leaf: leaf.copy(), state))
        items = args.Composite(
            params=args.StandardSave(state.params),
            ema_params=args.StandardSave(state.ema_params),
            rest=args.StandardSave(_rest(state)),
            data=args.JsonSave(data_state),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds for one full disk
            raise self._unsaved(error) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read the newest checkpoint.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` with the shardings to restore to.

        Returns:
          the state, and the loader's position.
        """
        args = self._ocp.args
        rest = _rest(abstract)
        items = self._restore(
            params=args.StandardRestore(abstract.params),
            ema_params=args.StandardRestore(abstract.ema_params),
            rest=args.StandardRestore(rest),
            data=args.JsonRestore(),
        )
        state = TrainState(params=items.params, ema_params=items.ema_params, **items.rest)
        return state, items.data

    def restore_ema(self, abstract: Any) -> Any:
        """Read only the averaged parameters of the newest checkpoint."""
        return self._restore(ema_params=self._ocp.args.StandardRestore(abstract)).ema_params

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          UserError: the checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved(error) from error

    def close(self) -> None:
        """Wait, and let go of Orbax's threads.

        Raises:
          UserError: the last checkpoint could not be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._unsaved(error) from error

    def _restore(self, **items: Any) -> Any:
        step = self.latest_step()
        if step is None:
            raise UserError(f"there is no checkpoint in {self._folder}.")
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except Exception as error:
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} cannot be read: {_reason(error)}\n"
                f"If it is damaged, move {self._folder / str(step)} away; the one before it is used then."
            ) from error

    def _unsaved(self, error: Exception) -> UserError:
        # What is on disk, not what Orbax remembers: the step that failed is no longer to be counted.
        whole = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        kept = f"The checkpoint of step {max(whole)} is intact" if whole else "There is no older checkpoint"
        return UserError(
            f"a checkpoint could not be written to {self._folder}: {_reason(error)}.\n"
            f"{kept}: make room (or make the folder writable) and run the same command."
        )


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "history": state.history}


def _reason(error: Exception) -> str:
    """What went wrong, in one line: the operating system's words, where they are in the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    found = re.search(r"([^:\n]+) \[os_error_code", text)
    return found[1].strip() if found else (text.splitlines() or [type(error).__name__])[0][:300]
