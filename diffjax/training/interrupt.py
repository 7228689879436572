"""Ctrl-C and SIGTERM: finish the step, save, leave; a second signal leaves at once.

Python runs a signal's handler in the main thread, between two of its own instructions: while that thread
compiles a network, for minutes. The operating system's part of the handler also writes to a socket, on which
a thread of ours waits, so that signals are heard at any time.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

INTERRUPTED = 75
"""The exit status of a program that was asked to stop: EX_TEMPFAIL, run the same command again."""

# What the main thread is given to leave in order where there is nothing to lose, before it is not waited for.
GRACE_SECONDS = 3.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal asked the program to stop; what it has made is saved."""


class Interrupt:
    """While active, remembers that a signal asked the program to stop.

    Use it as a context manager, and look at `requested` between steps. The second signal ends the process,
    with the status that shells give to one that died of it.

    Attributes:
      requested: the name of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._nothing_to_lose = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # whoever owns the main thread handles signals
        self._ours, self._systems = socket.socketpair()
        self._systems.setblocking(False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        self._waker = signal.set_wakeup_fd(self._systems.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._waker)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._systems.close()  # which the listener takes for the end
        self._listener.join()
        self._ours.close()

    @contextlib.contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """A block in which there is nothing to lose: a signal ends it, even while a network is compiled.

        Args:
          message: for the person who sent the signal.

        Raises:
          KeyboardInterrupt: a signal came, before or in the block.
        """
        if not self._previous:
            yield
            return
        self._nothing_to_lose = message
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._nothing_to_lose = ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, whenever it gets round to it."""
        self.requested = self.requested or signal.Signals(number).name
        if self._nothing_to_lose:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        heard = 0
        while numbers := self._ours.recv(16):
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                heard += 1
                name = signal.Signals(number).name
                if heard > 1:
                    _end(
                        f"{name} a second time: left at once. What was saved before is intact.", 128 + number
                    )
                self.requested = name
                if message := self._nothing_to_lose:
                    timer = threading.Timer(GRACE_SECONDS, self._end_if_still_there, [f"{name}: {message}"])
                    timer.daemon = True
                    timer.start()

    def _end_if_still_there(self, message: str) -> None:
        if self._nothing_to_lose:
            _end(message, INTERRUPTED)


def _end(message: str, status: int) -> None:
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # the cursor, which a progress bar hides
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    os._exit(status)
