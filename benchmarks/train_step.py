"""Images per second of the train step of each stage of some configurations, measured in turns.

    python -m benchmarks.train_step configs/quickstart.py [another.py …] [--rounds=10] [--steps=5]

Batches are random and already on the device: this is the step alone. The stages take turns, round by round,
so that whatever else the machine does falls on all of them; medians are shown, and the load.
"""

import argparse
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from diffjax.config import is_cascade
from diffjax.experiment import build_ema, build_optimizer, build_stage, build_update
from diffjax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from diffjax.parallel.rules import Rules, on_mesh, param_shardings
from diffjax.training.state import count_params, init_sharded
from diffjax.training.step import compile_train_step

TEXT_EMBED = 384


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    arguments = parser.parse_args()

    found = {name: config for path in arguments.configs for name, config in trained_stages(path).items()}
    runs = {name: prepare(config) for name, config in found.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, (run, _, _) in runs.items():
            start = time.perf_counter()
            run(arguments.steps)
            times[name].append((time.perf_counter() - start) / arguments.steps)

    device = jax.devices()[0]
    load = os.getloadavg()[0]
    title = f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores, load {load:.1f}"
    table = Table(
        "stage", "parameters", "px", "batch", "compile s", "images/s", "slowest to fastest", title=title
    )
    for name, (_, params, compile_seconds) in runs.items():
        config, rates = found[name], found[name].batch_size / np.asarray(times[name])
        cells = (
            name,
            f"{params:,}",
            config.crop or config.resolution,
            config.batch_size,
            f"{compile_seconds:.0f}",
        )
        spread = f"{rates.min():.0f} to {rates.max():.0f}"
        table.add_row(*map(str, cells), f"{np.median(rates):.0f}", spread)
    Console().print(table)


def trained_stages(path: str) -> dict[str, ConfigDict]:
    """The stages that a configuration file trains, by name."""
    config = runpy.run_path(path)["get_config"]()
    if not is_cascade(config):
        return {Path(path).stem: config}
    return {
        f"{Path(path).stem} {name}": entry.train for name, entry in config.stages.items() if "train" in entry
    }


def prepare(config: ConfigDict) -> tuple[Callable[[int], None], int, float]:
    """A function that makes some updates and waits for them; the number of parameters; seconds to compile."""
    mesh = make_mesh(**config.mesh)
    model = build_stage(config, text_embed=TEXT_EMBED)
    optimizer, learning_rate = build_optimizer(config)
    places = param_shardings(mesh, Rules(), model.shapes, model.axes)
    offload = config.optimizer.offload
    state = init_sharded(
        model.init, optimizer, jax.random.key(0), mesh, places, model.history, offload=offload
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    decay = build_ema(config)
    step = build_update(model.stage, optimizer, learning_rate, decay, accumulate=config.accumulate)
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    batch = put_batch(random_batch(config), mesh)
    key = jax.device_put(jax.random.key(1), replicated(mesh))

    def run(steps: int) -> None:
        nonlocal state
        with on_mesh(mesh, config.attention):
            for _ in range(steps):
                state, _ = update(state, batch, key)
        jax.block_until_ready(state)

    start = time.perf_counter()
    run(1)
    return run, count_params(state.params), time.perf_counter() - start


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """A batch such as the loader gives."""
    random, count, length = np.random.default_rng(0), config.batch_size, config.text.length
    side = config.crop or config.resolution
    return {
        "image": random.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "text": random.normal(size=(count, length, TEXT_EMBED)).astype(np.float16),
        "mask": np.ones((count, length), bool),
        "pooled": random.normal(size=(count, TEXT_EMBED)).astype(np.float32),
    }


if __name__ == "__main__":
    main()
