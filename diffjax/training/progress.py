"""What a person sees of a run while it goes on."""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class TrainingProgress:
    """A progress bar on a terminal, plain lines elsewhere (one per report).

    Args:
      label: what is being trained.
      start: steps already done.
      steps: length of the run.
      batch_size: images per step.
    """

    def __init__(self, label: str, *, start: int, steps: int, batch_size: int) -> None:
        self._label, self._start, self._steps, self._batch_size = label, start, steps, batch_size
        self._began = time.monotonic()
        self._reported = (self._began, start)
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task(label, total=steps, completed=start, note="compiling")

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: dict[str, float], *, waited: float = 0.0) -> dict[str, float]:
        """Show the metrics of `step`.

        Args:
          step: how many steps are done.
          values: the metrics; `loss` is shown, where there is one.
          waited: seconds since the last report in which there was no batch.

        Returns:
          since the last report: `images_per_second`, and `data_wait`, the share of the time that was waited.
        """
        now = time.monotonic()
        then, last = self._reported
        seconds = max(now - then, 1e-9)
        rate, wait = (step - last) * self._batch_size / seconds, min(waited / seconds, 1.0)
        self._reported = (now, step)
        left = (self._steps - step) * self._batch_size / max(rate, 1e-9)
        loss = values.get("loss", math.nan)
        note = f"{rate:.0f} images/s, {duration(left)} left, loss {loss:.4f}, data wait {wait:.0%}"
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        else:
            print(f"{self._label}: step {step}/{self._steps}, {note}", flush=True)
        return {"images_per_second": rate, "data_wait": wait}

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def elapsed(self) -> str:
        """Time since the start, for people."""
        return duration(time.monotonic() - self._began)


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 20 s` or `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
