"""What surrounds the steps: compiling, the cache of compiled programs, and the loader."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.cases import CASES, Case
from benchmarks.timing import load

PICTURES, LOADED_SIDE = 256, 64


def compile_rows(case: Case, batch: int, dtype: Any) -> Iterator[dict[str, Any]]:
    """The train step with one loop over the blocks, and with every block written out."""
    seconds = {}
    for name, scan in (("scanned", True), ("unrolled", False)):
        jax.clear_caches()
        start = time.process_time()
        traced, compiled = ours.compile_seconds(case, batch, dtype, scan=scan)
        seconds[name] = traced + compiled
        yield {
            "suite": "compile",
            "case": case.title,
            "program": name,
            "batch": batch,
            "trace_seconds": traced,
            "seconds": traced + compiled,
            "core_seconds": time.process_time() - start,
            "ratio": seconds["scanned"] / seconds[name],
            "load": load(),
        }


def cache_rows(name: str) -> Iterator[dict[str, Any]]:
    """The first update of a new process: without and with the programs of an earlier one on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        seconds: dict[str, float] = {}
        for program in ("cold cache", "warm cache"):
            command = [sys.executable, "-m", "benchmarks.machinery", name]
            done = subprocess.run(
                command, env=environment, cwd=_root(), capture_output=True, text=True, check=True
            )
            seconds[program] = float(done.stdout.split()[-1])
            yield {
                "suite": "cache",
                "case": CASES[name].title,
                "program": program,
                "seconds": seconds[program],
                "ratio": seconds["warm cache"] / seconds[program] if "warm cache" in seconds else 1.0,
                "load": load(),
            }


def loader_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Pictures a second through the loader, JPEG files of 256 pixels that are decoded and shrunk."""
    row = {"suite": "loader", "case": f"JPEG, 256 to {LOADED_SIDE} px"}
    try:
        import grain  # noqa: F401
        from PIL import Image
    except ImportError as error:
        yield row | {"note": f"absent: {error}"}
        return
    from diffjax.data.folder import load_folder
    from diffjax.data.loader import make_loader

    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        for number in range(PICTURES):
            coarse = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            path = Path(folder, "pictures", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            coarse.resize((256, 256)).save(path, quality=90)
            path.with_suffix(".txt").write_text("noise", encoding="utf-8")
        source = load_folder(Path(folder, "cache"), folder=path.parent, resolution=LOADED_SIDE)
        batches = make_loader(source, batch_size=64, seed=0, num_epochs=None)
        next(batches)
        rates = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(8):
                next(batches)
            rates.append(8 * 64 / (time.perf_counter() - start))
        batches.close()
    middle = float(np.median(rates))
    yield row | {
        "program": "loader",
        "batch": 64,
        "seconds": 64 / middle,
        "images_per_second": middle,
        "load": load(),
    }


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


if __name__ == "__main__":
    start = time.perf_counter()
    ours.train(CASES[sys.argv[1]], 8, np.float32)
    print(time.perf_counter() - start)
