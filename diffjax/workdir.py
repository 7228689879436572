"""A run's working directory: made, checked for writing, and held by one program at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from diffjax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def hold(workdir: Path, *, first: bool = True) -> Iterator[Path]:
    """Make `workdir` and hold it until the end of the block.

    The lock is the operating system's, on an open file: it ends with the process, however that ends.

    Args:
      workdir: the folder.
      first: whether this is the first process of its program; the others leave the lock to it.

    Raises:
      UserError: the folder cannot be made or written, or another process holds it.
    """
    if not first:
        yield workdir
        return
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock, and nothing else differs
        workdir.mkdir(parents=True, exist_ok=True)
        yield workdir
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"cannot write to the working directory {workdir}: {error.strerror}. Choose another --workdir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read(20).strip() or "unknown"
            raise UserError(
                f"another process (number {holder}) is working in {workdir}. "
                "Wait for it, stop it, or choose another --workdir."
            ) from None
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the number is only for the message above
            lock.write(str(os.getpid()))
            lock.flush()
        yield workdir
