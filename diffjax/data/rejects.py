"""Examples that cannot be used: skipped, counted by reason, and named in a file."""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from diffjax.data.source import BadExample, Example, Source
from diffjax.errors import UserError

FILE = "rejects.jsonl"
IN_A_ROW = 1000
"""After so many bad examples without a usable one between them, the data are taken for lost."""

# So many never stop a run, unless they are half of the data or none is allowed: 1 of 30 is no sign of much.
_A_FEW = 3


class Rejects:
    """The bad examples of a run, each once, with its reason; for any number of threads.

    They are appended to `rejects.jsonl` in the run's folder, those that another process than the first one
    meets to `rejects-1.jsonl` and so on. Each line is `{"key": …, "reason": …}`. A run that is resumed knows
    them, and does not try them again: what was skipped stays skipped, even if it was mended meanwhile.

    Attributes:
      path: the file of this process; None if nothing is written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        max_share: float = 1.0,
        process: int = 0,
        resumed: bool = False,
        log: Callable[[str], None] = print,
    ):
        """Open the file.

        Args:
          folder: the run's; None to write nothing.
          max_share: of the examples; when more are bad, `check` raises.
          process: the number of this process. The first must be ready before the others begin.
          resumed: whether to go on with the files that are there; otherwise the first process removes them.
          log: receives a warning, as `print` would, when the file cannot be written.
        """
        self.path = None if folder is None else folder / (f"rejects-{process}.jsonl" if process else FILE)
        self._max_share, self._process, self._log = max_share, process, log
        self._reasons: dict[str, str] = {}
        self._met: set[str] = set()  # by this program, in training
        self._seen = self._size = self._listed = self._found = 0
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._warned = False
        if folder is None or self.path is None:
            return
        for path in sorted(folder.glob("rejects*.jsonl")):
            if resumed:
                self._reasons.update(_read(path))
            elif not process:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # half a line, of a program that was killed
            os.truncate(self.path, _end_of_lines(self.path))

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, key: str) -> bool:
        return key in self._reasons

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each reason, the most frequent first."""
        with self._lock:
            return dict(Counter(self._reasons.values()).most_common())

    def add(self, key: str, reason: str) -> None:
        """Note an example that was met; a second time changes nothing."""
        with self._lock:
            self._met.add(key)
            self._note([(key, reason)])

    def found(self, examples: Iterable[tuple[str, str]], listed: int) -> None:
        """Note examples that were found before the training, by every process.

        Args:
          examples: their keys and reasons.
          listed: how many examples there are, those included.

        Raises:
          UserError: there are too many.
        """
        examples = list(examples)
        with self._lock:
            self._note(examples, write=not self._process)
            self._found, self._listed = len(examples), listed
        if self._found > self._allowed(listed, listed):
            raise UserError(self._too_many(self._found, listed))

    def usable(self, source: Source, i: int) -> tuple[int, Example]:
        """Example `i`, or in place of a bad one the next that can be used; after the last comes the first.

        Which one that is depends on nothing but the data: not on threads, processes, or restarts.

        Returns:
          the place of the example in the source, and the example.

        Raises:
          UserError: too many are bad.
        """
        self._size = len(source)
        for _ in range(min(self._size, IN_A_ROW)):
            key = source.keys[i]
            self._seen += 1  # without the lock: a count that is lost among thousands changes nothing
            if key in self._reasons:
                self._met.add(key)
            else:
                try:
                    return i, source[i]
                except BadExample as bad:
                    self.add(key, bad.reason)
                    self.check()
            i = (i + 1) % self._size
        raise UserError(
            f"None of {min(self._size, IN_A_ROW):,} examples in a row can be used{self._why()}.\n"
            "Is the data set still there? `--mode=data` checks all of it."
        )

    def check(self) -> None:
        """Raise if more than the allowed share of the examples met so far are bad.

        While only a part of the data was seen, a part that happens to be worse than the whole is allowed for:
        by three standard deviations.

        Raises:
          UserError: there are too many.
        """
        seen = min(self._seen, self._size)
        if len(self._met) > self._allowed(seen, self._size):
            raise UserError(self._too_many(len(self._met), seen))

    def close(self) -> None:
        """Write what could not be written before, if it can be now."""
        with self._lock:
            self._write()

    def _allowed(self, seen: int, size: int) -> float:
        expected = self._max_share * seen
        if not self._max_share:
            return 0.0
        margin = 3.0 * expected**0.5 if seen < size else 0.0
        return max(expected + margin, min(_A_FEW, size / 2))

    def _why(self) -> str:
        counts = ", ".join(f"{count:,}: {reason}" for reason, count in self.counts.items())
        where = f"; {self.path.parent}/rejects*.jsonl names them" if self.path else ""
        return f" ({counts}{where})"

    def _too_many(self, bad: int, seen: int) -> str:
        return (
            f"{bad:,} of {seen:,} examples cannot be used, more than data.max_rejects={self._max_share:g}"
            f"{self._why()}.\nMend or remove them (`--mode=data` checks all), or allow more."
        )

    def _note(self, examples: list[tuple[str, str]], *, write: bool = True) -> None:
        for key, reason in examples:
            if key not in self._reasons:
                self._reasons[key] = reason
                if write:
                    line = json.dumps({"key": key, "reason": reason}, ensure_ascii=False)
                    self._unwritten.append(line.encode("utf-8", "backslashreplace") + b"\n")
        self._write()

    def _write(self) -> None:
        """Append what is not written yet; if that fails, later again: a run does not end for its list."""
        if self.path is None or not self._unwritten:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                end = _end_of_lines(self.path)
                file.truncate(end)  # half a line, of a disk that was full
                data = b"".join(self._unwritten)
                if file.write(data) != len(data):
                    file.truncate(end)
                    raise OSError(0, "no space left")
            self._unwritten.clear()
        except OSError as error:
            if not self._warned:
                self._log(
                    f"warning: cannot write {self.path}: {error.strerror}; bad examples are still skipped."
                )
            self._warned = True


def _read(path: Path) -> dict[str, str]:
    """Reasons by key; what is no line of ours is left out."""
    reasons = {}
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                reasons[str(entry["key"])] = str(entry["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return reasons


def _end_of_lines(path: Path) -> int:
    """How many bytes of a file end in a complete line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0
