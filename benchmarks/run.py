"""Every measurement by one command: a table, and JSON.

    python -m benchmarks.run [--suite NAME …] [--case NAME …] [--json FILE] [--peer-python PYTHON]

Suites: `train` (updates), `forward`, `sampling` (from seeds to images on the host), `compile` (one loop over
the blocks against every block on its own), `cache` (the first update with and without compiled programs on
disk) and `loader`. On a CPU the networks of the first three take turns with the same ones of other libraries,
where these are installed: in the Python that `--peer-python` names, in a process of their own. `ratio` is our
time over that of the row, the median over the rounds; `load` is the machine's during the row.

jax, flax, optax and ml_collections suffice for all but the peers and the loader; that needs grain and Pillow.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machinery, ours
from benchmarks.cases import CASES, Case
from benchmarks.peers import Absent, Peer
from benchmarks.timing import hardware, in_turns, load

NETWORK_SUITES, OTHER_SUITES = ("train", "forward", "sampling"), ("compile", "cache", "loader")
SUITES = (*NETWORK_SUITES, *OTHER_SUITES)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
COLUMNS = ("suite", "case", "program", "batch", "parameters", "first s", "s", "core s", "images/s", "ratio")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    results: dict[str, Any] = {"hardware": hardware(), "dtype": options.dtype, "load_before": load()}
    rate = ours.matrix_rate(DTYPES[options.dtype])
    results |= {"matrix_flops_per_second": rate, "rows": []}
    for row in measure(options, rate):
        results["rows"].append(row)
        print(" ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
    results["load_after"] = load()
    Console(width=150).print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", default=SUITES, choices=SUITES)
    parser.add_argument(
        "--case", nargs="+", default=(), choices=sorted(CASES), help="default: what can be done"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--dtype", default="float32" if cpu else "bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=1 if cpu else 10, help="updates or passes in a round")
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--batch", type=int, default=0, help="default: the case's own")
    parser.add_argument("--threads", type=int, default=hardware()["cores"], help="of the peers")
    parser.add_argument("--peer-python", default="", help="where torch and diffusers are installed")
    parser.add_argument("--peers", nargs="*", default=("eager", "compiled"), choices=("eager", "compiled"))
    parser.add_argument(
        "--unrolled",
        action=argparse.BooleanOptionalAction,
        default=cpu,
        help="every block written out, not one loop; default: on CPUs",
    )
    parser.add_argument("--deep", default="dit-xl2", choices=sorted(CASES), help="whose compile time")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, rate: float) -> Iterator[dict[str, Any]]:
    """The rows, one after the other."""
    cpu = jax.default_backend() == "cpu"
    for suite in (suite for suite in NETWORK_SUITES if suite in options.suite):
        for name, case in CASES.items():
            if options.case and name not in options.case:
                continue
            if cpu and not case.small and not options.case:
                yield {"suite": suite, "case": case.title, "note": f"skipped on a CPU; ask by --case={name}"}
                continue
            yield from compare(suite, case, options, rate)
    batch = 8
    if "compile" in options.suite:
        yield from machinery.compile_rows(CASES[options.deep], batch, DTYPES[options.dtype])
    if "cache" in options.suite:
        yield from machinery.cache_rows(options.case[0] if options.case else "dit-s2")
    if "loader" in options.suite:
        yield from machinery.loader_rows(options.rounds)


def compare(suite: str, case: Case, options: argparse.Namespace, rate: float) -> Iterator[dict[str, Any]]:
    """Our row and the peers' of one network."""
    cpu = jax.default_backend() == "cpu"
    batch = options.batch or (case.batch if cpu else case.big_batch)
    dtype = DTYPES[options.dtype]
    case = dataclasses.replace(case, network=functools.partial(case.network, scan=not options.unrolled))
    make = {
        "train": ours.train,
        "forward": ours.forward,
        "sampling": functools.partial(ours.sampling, num_steps=options.steps),
    }[suite]
    every = jax.device_count()
    counts = (1,) if every == 1 or batch % every else (1, every)
    programs = {
        "diffjax" if count == 1 else f"diffjax, {count} devices": make(case, batch, dtype, count=count)
        for count in counts
    }
    shared = {"suite": suite, "case": case.title, "batch": batch, "dtype": options.dtype}
    about: dict[str, dict[str, Any]] = {
        name: {
            "parameters": program.parameters,
            "first_seconds": program.first_seconds,
            "flops": program.flops,
        }
        for name, program in programs.items()
    }
    runs: dict[str, Any] = {name: program.run for name, program in programs.items()}

    peer = Peer(options.peer_python)
    absent: dict[str, str] = {}
    for how in options.peers if cpu and options.dtype == "float32" else ():
        name = f"torch {how}"
        try:
            if case.peer is None:
                raise Absent("no peer has this network")
            spec = {
                "peer": case.peer,
                "batch": batch,
                "side": case.side,
                "channels": case.channels,
                "text": case.text,
                "low_res": case.low_res,
                "num_steps": options.steps,
            }
            about[name] = peer.build(suite, spec, compiled=how == "compiled", threads=options.threads)
            runs[name] = functools.partial(peer.run, about[name].pop("id"))
        except Absent as error:
            absent[name] = str(error)
    try:
        times = in_turns(runs, options.rounds, 1 if suite == "sampling" else options.count)
    finally:
        peer.close()
    for name, seconds in times.items():
        middle, cores = np.median(seconds, axis=0).tolist()
        yield {
            **shared,
            "program": name,
            **about[name],
            "seconds": middle,
            "fastest": float(seconds[:, 0].min()),
            "slowest": float(seconds[:, 0].max()),
            "core_seconds": cores,
            "images_per_second": batch / middle,
            "ratio": float(np.median(times["diffjax"][:, 0] / seconds[:, 0])),
            **({"mfu": about[name]["flops"] / middle / rate} if name == "diffjax" else {}),
            "load": load(),
        }
    for name, why in absent.items():
        yield {**shared, "program": name, "note": f"absent: {why}"}


def table(results: dict[str, Any]) -> Table:
    """The rows for people."""
    machine = results["hardware"]
    shown = Table(
        *COLUMNS,
        "FLOP/s",
        "load",
        title=f"{machine['devices']} x {machine['device']}, {machine['cores']} cores, {results['dtype']}, "
        f"jax {machine['jax']}; a matrix product: {results['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s; "
        f"load {results['load_before']} before, {results['load_after']} after",
    )
    keys = (
        "suite",
        "case",
        "program",
        "batch",
        "parameters",
        "first_seconds",
        "seconds",
        "core_seconds",
        "images_per_second",
        "ratio",
    )
    for row in results["rows"]:
        if "note" in row:
            shown.add_row(row["suite"], row["case"], f"{row.get('program', '')} {row['note']}".strip())
            continue
        cells = [_short(row.get(key, "")) for key in keys]
        used = f"{row['mfu']:.0%} of a matrix product's" if "mfu" in row else ""
        shown.add_row(*cells, used, _short(row.get("load", "")))
    return shown


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
