"""Lines that say how far a long preparation is."""

import time
from collections.abc import Callable

_SECONDS_PER_LINE = 30.0


def progress(log: Callable[[str], None], total: int, what: str) -> Callable[[int], None]:
    """A function that is told how many more of `total` are done, and says so now and then.

    Args:
      log: receives the lines.
      total: how many there are.
      what: the end of each line's first part, as in "pictures encoded".
    """
    begun = said = time.monotonic()
    done = 0

    def report(more: int) -> None:
        nonlocal done, said
        done, now = done + more, time.monotonic()
        if now - said >= _SECONDS_PER_LINE:
            rate, said = done / (now - begun), now
            log(f"{done:,} of {total:,} {what}, {rate:.1f} a second.")

    return report
