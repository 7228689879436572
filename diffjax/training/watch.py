"""Watching a run: losses that stop being numbers or jump, and processes that hang."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np

HUNG = 70
"""The exit status of a process that ended itself because it had stopped making steps."""

WINDOW = 256
"""Losses that the next one is compared with."""

_ENOUGH = 64  # of them, to say what is usual


class Trouble(NamedTuple):
    """Why a run cannot go on from where it is.

    Attributes:
      first: the first update of those that went wrong.
      last: the one at which that was enough.
      why: in words.
      finite: whether there were numbers.
    """

    first: int
    last: int
    why: str
    finite: bool


class LossWatch:
    """Decides by the losses when a run is to go back to an older checkpoint.

    An update whose loss or gradient is not finite is left out on the device; `max_skips` of them in a row are
    too many. A spike are `spike_steps` losses in a row, each of which exceeds the median of the 256 before by
    `spike` times their spread (1.4826 times the median absolute deviation, the standard deviation of normal
    numbers; at least 1 % of the median).

    Args:
      max_skips: how many skipped updates in a row are trouble.
      spike: the z-score; 0: there are no spikes.
      spike_steps: how many high losses in a row are trouble.
    """

    def __init__(self, *, max_skips: int, spike: float, spike_steps: int) -> None:
        self._max_skips, self._spike, self._spike_steps = max_skips, spike, spike_steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._high: list[tuple[int, float]] = []  # updates and their losses
        self._skips = 0
        self.skipped = 0

    def see(self, step: int, loss: float, skipped: bool) -> Trouble | None:
        """Judge update number `step`; they must come in order, each once."""
        if skipped:
            self.skipped += 1
            self._skips += 1
            if self._skips >= self._max_skips:
                why = f"{self._skips} updates in a row had a loss or gradient that is not finite"
                return Trouble(step - self._skips + 1, step, why, finite=False)
            return None
        self._skips = 0
        usual, spread = self._usual()
        if self._spike and (loss - usual) > self._spike * spread:
            self._high.append((step, loss))
            if len(self._high) >= self._spike_steps:
                least = min(loss for _, loss in self._high)
                why = (
                    f"the loss rose to {least:.4g} and more for {len(self._high)} updates, from "
                    f"{usual:.4g} (a z-score of {(least - usual) / spread:.0f})"
                )
                return Trouble(self._high[0][0], step, why, finite=True)
            return None
        self._losses.extend([*(high for _, high in self._high), loss])  # a few high ones were no spike
        self._high = []
        return None

    def mean(self) -> float | None:
        """The mean of the newest losses; None before there are any."""
        return float(np.mean(self._losses)) if self._losses else None

    def get_state(self) -> dict[str, Any]:
        """What it knows, as JSON can hold it."""
        return {
            "losses": list(self._losses),
            "high": [list(pair) for pair in self._high],
            "skips": self._skips,
            "skipped": self.skipped,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._high = [(step, loss) for step, loss in state["high"]]
        self._skips, self.skipped = state["skips"], state["skipped"]

    def _usual(self) -> tuple[float, float]:
        if len(self._losses) < _ENOUGH:
            return np.inf, 1.0
        losses = np.asarray(self._losses)
        median = float(np.median(losses))
        spread = 1.4826 * float(np.median(np.abs(losses - median)))
        return median, max(spread, 0.01 * abs(median), 1e-12)


class Watchdog:
    """Ends this process if it has not been told for long enough that it is well.

    Where processes compute together, one that hangs or has died keeps all others waiting for ever. Before it
    ends, the stacks of all threads are written to standard error. Time is that of the monotonic clock.

    Args:
      seconds: after which; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._well = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.well()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def well(self) -> None:
        """Say that all is well."""
        self._well = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(max(self._well + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() - self._well < self._seconds:
                continue
            print(
                f"error: no step for {self._seconds / 60:.4g} minutes (recovery.hang_minutes): this process, "
                "or one that it waits for, hangs. Its threads are at:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            print("Run the same command to go on from the last checkpoint.", file=sys.stderr, flush=True)
            os._exit(HUNG)
