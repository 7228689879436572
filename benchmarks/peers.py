"""Asking a peer's process for one timed run at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Absent(Exception):
    """A peer cannot do what it is asked: a package is missing, or it has no such network."""


class Peer:
    """A process that runs `benchmarks/peer.py` in some Python."""

    def __init__(self, python: str = ""):
        """Start it; by default in the Python of this process."""
        self._python = python or sys.executable
        self._process: subprocess.Popen[str] | None = None

    def build(self, task: str, case: dict[str, Any], *, compiled: bool, threads: int) -> dict[str, Any]:
        """Make a program of its network; the answer names its `id` and the `library`.

        Raises:
          Absent: it cannot.
        """
        return self._ask({"build": task, "case": case, "compiled": compiled, "threads": threads})

    def run(self, program: int, count: int) -> tuple[float, float]:
        """Seconds of so many calls: of the clock, and of all cores together."""
        clock, cores = self._ask({"run": count, "id": program})["seconds"]
        return clock, cores

    def close(self) -> None:
        """End the process, and what it holds in memory."""
        if self._process is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
            self._process = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    [self._python, str(Path(__file__).with_name("peer.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    bufsize=1,
                )
            self._process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except OSError as error:
            raise Absent(f"{self._python}: {error}") from None
        if not line:
            self.close()
            raise Absent(f"{self._python} ended without an answer")
        answer = json.loads(line)
        if "absent" in answer:
            raise Absent(answer["absent"])
        return answer
