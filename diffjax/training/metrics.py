"""Where the numbers of a run go: TensorBoard, and a plain file of JSON lines."""

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.errors import UserError


class MetricsWriter:
    """Writes scalars and images of a run below its working directory.

    Scalars go to `metrics.jsonl`, one object a line, and with the images to TensorBoard files in
    `tensorboard/`. Lines of steps after `start_step` are removed on opening: a run that was killed had got
    further than its last checkpoint, and will write those steps again.
    """

    def __init__(self, workdir: Path, *, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        try:
            self._drop_after(start_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )
        except OSError as error:
            raise UserError(f"metrics cannot be written to {workdir}: {error.strerror}.") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}.") from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show an image, uint8 `[height, width, 3]`, on TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")
        with contextlib.suppress(OSError):  # the picture is a file too, whose writer reports a full disk
            self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        with contextlib.suppress(OSError):  # a full disk, which was reported where it was met
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if int(json.loads(line)["step"]) <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # half a line, from the moment the process was killed
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)  # as a whole: a run killed here keeps its old metrics


class NoMetrics(MetricsWriter):
    """Writes nothing: for those of several processes that leave it to the first."""

    def __init__(self) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write nothing."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Close nothing."""


class Share(NamedTuple):
    """A metric that not every step has: a sum, and over how many examples."""

    total: jax.Array
    examples: jax.Array


class Seen(NamedTuple):
    """What is to be known of each update: its number, its loss, and whether it was left out."""

    step: int
    loss: float
    skipped: bool


class MetricsBuffer:
    """Metrics of steps that the device may still be working on.

    Reading a metric waits for its step. The loop therefore adds each step's metrics here unread, and reads
    them later, when newer steps have been dispatched: the device never waits for the host.
    """

    def __init__(self) -> None:
        self._unread: deque[Mapping[str, jax.Array | Share]] = deque()
        self._sums: dict[str, float] = {}  # of steps that were waited for, since metrics were last read
        self._counts: dict[str, float] = {}
        self._unseen: deque[tuple[int, Any, Any]] = deque()

    def add(self, step: int, metrics: Mapping[str, jax.Array | Share]) -> None:
        """Keep the metrics of update number `step`, among them `loss` and `skipped`."""
        loss: Any = metrics["loss"]
        skipped: Any = metrics["skipped"]
        for scalar in (loss, skipped):
            scalar.copy_to_host_async()  # so that to see it is not to ask the device
        self._unread.append(metrics)
        self._unseen.append((step, loss, skipped))

    def see(self, *, leave: int = 0) -> Iterator[Seen]:
        """Those of all but the newest `leave` steps that were not seen yet; waits for them."""
        while len(self._unseen) > leave:
            step, *scalars = self._unseen.popleft()
            loss, skipped = jax.device_get(scalars)
            yield Seen(step, float(loss), bool(skipped))

    def read(self, *, leave: int = 0) -> dict[str, float]:
        """Read all but the newest `leave` steps.

        Returns:
          the mean of each metric over the updates that were not left out, but of those that none of them had.
        """
        self._wait(leave)
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        self._sums, self._counts = {}, {}
        return means

    def get_state(self) -> dict[str, Any]:
        """What was not read yet, as JSON can hold it; waits for all steps."""
        self._wait(0)
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave, so that the next means are over the same steps."""
        self._unread.clear()
        self._unseen.clear()
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    def _wait(self, leave: int) -> None:
        while len(self._unread) > leave:
            values = jax.device_get(dict(self._unread.popleft()))
            if values.pop("skipped"):
                continue
            for name, value in values.items():
                total, count = value if isinstance(value, Share) else (value, 1.0)
                self._sums[name] = self._sums.get(name, 0.0) + float(total)
                self._counts[name] = self._counts.get(name, 0.0) + float(count)
