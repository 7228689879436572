"""Ctrl-C and SIGTERM: finish the step, save, leave; a second signal leaves at once."""

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While active, remembers that a signal asked the program to stop.

    Use it as a context manager, and look at `requested` between steps.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        # From now on the default action: the next Ctrl-C or SIGTERM ends the process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
