"""Programs that take turns, so that whatever else the machine does falls on all of them."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Seconds = tuple[float, float]
"""Of the clock, and of all cores together."""


def in_turns(
    runs: Mapping[str, Callable[[int], Seconds | None]], rounds: int, count: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of one of `count` calls in each round, `[rounds, 2]` for each program, as in `Seconds`.

    A program that lies in another process returns the seconds that it took there. Each has been called once
    before, so that nothing is compiled here. The order is turned round in every second round.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            start = time.perf_counter(), time.process_time()
            there = runs[name](count)
            here = time.perf_counter() - start[0], time.process_time() - start[1]
            times[name].append(here if there is None else there)
    return {name: np.asarray(column) / count for name, column in times.items()}


def load() -> float:
    """How many processes wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def hardware() -> dict[str, Any]:
    """What the numbers depend on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
