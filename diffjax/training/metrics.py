"""Where the numbers of a run go: TensorBoard, and a plain file of JSON lines."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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


class NotFinite(Exception):
    """The loss or the gradient became NaN or infinite.

    Attributes:
      step: the first step at which it was.
    """

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(f"{name} became {value} at step {step}")
        self.step = step


class MetricsBuffer:
    """Metrics of steps that the device may still be working on.

    Reading a metric waits for its step. The loop therefore adds each step's metrics here unread, and reads
    them later, when newer steps have been dispatched: the device never waits for the host.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keep the metrics of update number `step`."""
        self._unread.append((step, metrics))

    def wait(self, *, leave: int) -> None:
        """Wait for all but the newest `leave` steps; nothing is read."""
        if len(self._unread) > leave:
            jax.block_until_ready(self._unread[-1 - leave][1])

    def check(self) -> None:
        """Wait for all steps; their metrics stay to be read.

        Raises:
          NotFinite: a metric of one of them is not a finite number.
        """
        for step, metrics in self._unread:
            _finite(step, metrics)

    def read(self, *, leave: int = 0) -> dict[str, float]:
        """Read all but the newest `leave` steps.

        Returns:
          the mean of each metric over the steps read, but of those that none of them had.

        Raises:
          NotFinite: a metric of one of these steps is not a finite number.
        """
        end = len(self._unread) - leave
        ready, self._unread = self._unread[:end], self._unread[end:]
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for step, metrics in ready:
            for name, (value, count) in _finite(step, metrics).items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}


def _finite(step: int, metrics: Mapping[str, jax.Array | Share]) -> dict[str, tuple[float, float]]:
    """Each metric's sum and count."""
    values = {}
    for name, value in jax.device_get(dict(metrics)).items():
        total, count = value if isinstance(value, Share) else (value, 1.0)
        if not np.isfinite(total):
            raise NotFinite(step, name, float(total))
        values[name] = float(total), float(count)
    return values
