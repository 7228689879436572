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
        self._unread: list[tuple[int, Mapping[str, jax.Array | Share]]] = []
        self._unseen: deque[tuple[int, Any, Any]] = deque()

    def add(self, step: int, metrics: Mapping[str, jax.Array | Share]) -> None:
        """Keep the metrics of update number `step`, among them `loss` and `skipped`."""
        loss: Any = metrics["loss"]
        skipped: Any = metrics["skipped"]
        for scalar in (loss, skipped):
            scalar.copy_to_host_async()  # so that to see it is not to ask the device
        self._unread.append((step, metrics))
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
        end = len(self._unread) - leave
        ready, self._unread = self._unread[:end], self._unread[end:]
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for _, metrics in ready:
            values = jax.device_get(dict(metrics))
            if values.pop("skipped"):
                continue
            for name, value in values.items():
                total, count = value if isinstance(value, Share) else (value, 1.0)
                sums[name] = sums.get(name, 0.0) + float(total)
                counts[name] = counts.get(name, 0.0) + float(count)
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}
