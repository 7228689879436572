"""What a solver costs beyond the network: sampling against as many bare calls of the network, in turns.

    python -m benchmarks.sampling [--steps=50] [--rounds=15] [--embed=64] [--solvers ddim heun …]

Both are one compiled loop. The network is a small transformer, so that what the solver adds can be seen at
all; the ratio is 1 where it adds nothing. Medians of the rounds are shown, and the load.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from diffjax.diffusion import grids, schedules
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.predictions import v
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.solvers import SOLVERS
from diffjax.models.dit import DiT
from diffjax.nn.conditioning import Cond
from diffjax.nn.placement import unbox

SIDE, BATCH = 16, 8
DEFAULT = ("ddim", "ddpm", "heun", "dpmpp_2m", "unipc", "dpm_solver", "dpmpp_sde", "edm")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--embed", type=int, default=64, help="width of the network")
    parser.add_argument("--solvers", nargs="+", default=DEFAULT, choices=sorted(SOLVERS))
    arguments = parser.parse_args()

    net = small_network(arguments.embed)
    load = os.getloadavg()[0]
    device = jax.devices()[0].device_kind
    table = Table(
        "solver",
        "calls",
        "network ms",
        "sampling ms",
        "ratio",
        "temporary MB at 1x and 4x the steps",
        title=f"{arguments.steps} steps, {device}, {os.cpu_count()} cores, load {load:.1f}",
    )
    for name in arguments.solvers:
        calls = count_calls(name, arguments.steps)
        bare = jax.jit(lambda keys, calls=calls: bare_calls(net, keys, calls))
        solved = jax.jit(lambda keys, name=name: sampled(net, name, keys, arguments.steps))
        times = in_turns([bare, solved], arguments.rounds)
        memory = [temporary_bytes(net, name, steps) / 1e6 for steps in (arguments.steps, 4 * arguments.steps)]
        ratio = np.median(times[1] / times[0])
        network, sampling = (1e3 * np.median(column) for column in times)
        table.add_row(
            name,
            str(calls),
            f"{network:.1f}",
            f"{sampling:.1f}",
            f"{ratio:.3f}",
            f"{memory[0]:.2f}, {memory[1]:.2f}",
        )
    Console().print(table)


def small_network(embed: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A transformer with random parameters, as a function of x and log-SNR."""
    model = DiT(patch=2, embed=embed, depth=4, heads=2, cross_attention=False)
    cond = Cond(jnp.zeros((BATCH, 1, 8)), jnp.ones((BATCH, 1), bool), jnp.zeros((BATCH, 8)))
    x = jnp.zeros((BATCH, SIDE, SIDE, 3))
    params = unbox(jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(BATCH), cond))
    return lambda x, level: model.apply(params, x, level, cond)


def bare_calls(net: Callable[..., jax.Array], keys: jax.Array, calls: int) -> jax.Array:
    """The network called on its own output, in one loop."""
    x = jax.vmap(lambda key: jax.random.normal(key, (SIDE, SIDE, 3)))(keys)
    levels = jnp.broadcast_to(jnp.linspace(-5.0, 5.0, calls)[:, None], (calls, keys.shape[0]))
    return jax.lax.scan(lambda x, level: (0.5 * x + net(x, level), None), x, levels)[0]


def sampled(net: Callable[..., jax.Array], name: str, keys: jax.Array, steps: int) -> jax.Array:
    """Samples of the same network."""
    schedule = schedules.cosine()
    times = grids.uniform()(schedule, steps)
    denoise = make_denoiser(net, schedule, v)
    return sample(denoise, schedule, SOLVERS[name](), keys=keys, shape=(SIDE, SIDE, 3), times=times)


def count_calls(name: str, steps: int) -> int:
    """How often a solver evaluates the network."""
    calls = 0

    def count(x: Any) -> None:
        nonlocal calls
        calls += 1

    def net(x: jax.Array, level: jax.Array) -> jax.Array:
        jax.debug.callback(count, level[0])
        return 0.1 * x

    sampled(net, name, jax.random.split(jax.random.key(0), 1), steps).block_until_ready()
    jax.effects_barrier()
    return calls


def temporary_bytes(net: Callable[..., jax.Array], name: str, steps: int) -> int:
    """Memory that the compiled sampler needs beside its arguments and result."""
    keys = jax.random.split(jax.random.key(0), BATCH)
    analysis = jax.jit(lambda keys: sampled(net, name, keys, steps)).lower(keys).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def in_turns(runs: list[Callable[[jax.Array], jax.Array]], rounds: int) -> np.ndarray:
    """Seconds of each run, `[runs, rounds]`."""
    keys = [jax.random.split(jax.random.key(seed), BATCH) for seed in range(rounds + 1)]
    for run in runs:
        run(keys[-1]).block_until_ready()
    times = np.zeros((len(runs), rounds))
    for number in range(rounds):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run(keys[number]).block_until_ready()
            times[index, number] = time.perf_counter() - start
    return times


if __name__ == "__main__":
    main()
