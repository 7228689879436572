"""The next batches are made and sent to the devices while they are at work on this one."""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol


class Loader(Protocol):
    """An iterator of batches that knows its position."""

    def __next__(self) -> dict[str, Any]:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The position after the last batch."""
        ...


class Prefetch:
    """A loader whose batches are placed ahead of time, by one thread of their own, in the loader's order.

    Copies to devices do not wait for one another, but reading, stacking and handing over a batch takes the
    thread that does it; here that is not the one that keeps the devices busy.

    Args:
      loader: the batches; it must be at its position already, and is not closed here.
      place: from a batch of the loader to what is asked for here. It runs in the thread, so it must start no
        program that several processes compute together: those must begin in the same order everywhere.
      ahead: how many batches are placed before they are asked for.
    """

    def __init__(self, loader: Loader, place: Callable[[dict[str, Any]], Any], *, ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; expected at least 1")
        self._loader, self._place = loader, place
        self._state = loader.get_state()
        self._waited = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: collections.deque[Future[tuple[Any, Any]]] = collections.deque()
        for _ in range(ahead):
            self._coming.append(self._pool.submit(self._load))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch; what the loader or `place` raised, it raises."""
        begun = time.monotonic()
        try:
            batch, self._state = self._coming[0].result()
        finally:
            self._waited += time.monotonic() - begun
        self._coming.popleft()
        self._coming.append(self._pool.submit(self._load))
        return batch

    def get_state(self) -> Any:
        """The loader's position after the last batch that was asked for, whatever was read ahead."""
        return self._state

    def waited(self) -> float:
        """Seconds that `next` has waited since this was last called."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the thread; the batches that it has placed are let go."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()

    def _load(self) -> tuple[Any, Any]:
        batch = next(self._loader)
        return self._place(batch), self._loader.get_state()
