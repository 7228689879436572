"""What it costs that a run can be trusted, as shares of its steps.

    python -m benchmarks.reliability [--case NAME] [--batch N] [--rounds N] [--every N]

Measured on this machine: the update with and without the rule that leaves out what is not finite, in turns,
by the clock and in seconds of all cores together; what the host does about each step's loss; the digests of a
checkpoint, spread over the steps between two of them; and what is asked of each picture beside decoding it.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import ours
from benchmarks.cases import CASES
from benchmarks.timing import hardware, in_turns, load
from diffjax.data.decode import decode
from diffjax.data.rejects import Rejects
from diffjax.data.source import Example
from diffjax.training import digests
from diffjax.training.metrics import MetricsBuffer
from diffjax.training.watch import LossWatch


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    case = CASES[options.case]
    print(f"{hardware()}\nload {load()}")
    # Two programs that are the same differ, too, by where their arrays happen to lie.
    rules = {"plain": False, "again": False, "guarded": True}
    made = {
        name: ours.train_program(case, options.batch, jnp.float32, skip_bad=rule)
        for name, rule in rules.items()
    }
    programs = {name: ours.updates(*each)[0] for name, each in made.items()}
    for run in programs.values():
        run(1)
    times = in_turns(programs, options.rounds)
    ratio, same = (np.median(times[name] / times["plain"], axis=0) for name in ("guarded", "again"))
    update = float(np.median(times["plain"][:, 0]))
    print(f"{case.title}, batch {options.batch}: {update * 1e3:.1f} ms an update")

    def row(what: str, seconds: float) -> None:
        print(f"{what:58} {seconds * 1e6:10.1f} us a step {seconds / update:8.2%}")

    row("leaving out what is not finite, by the clock", (ratio[0] - 1.0) * update)
    row("the same, by the cores' seconds", (ratio[1] - 1.0) * update)
    row("the plain program once more, by the clock", (same[0] - 1.0) * update)
    row("the same, by the cores' seconds", (same[1] - 1.0) * update)
    row("looking at each loss", loss_seconds())
    state = jax.jit(made["plain"][1])(jax.random.key(0))
    trees = {"params": state.params, "ema_params": state.ema_params, "rest": state.opt_state}
    row(f"digests of a checkpoint every {options.every:,} steps", digest_seconds(trees) / options.every)
    looking, decoding = example_seconds()
    row("looking at each picture of a batch", looking * options.batch)
    print(f"{'':58} {looking / decoding:28.2%} of decoding it ({decoding * 1e3:.2f} ms)")
    print(f"load {load()}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="unet32", choices=CASES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=1000, help="steps between two checkpoints")
    return parser.parse_args(arguments)


def loss_seconds(steps: int = 2000) -> float:
    """What the host does about the loss of one step that the device has finished."""
    watch = LossWatch(max_skips=10, spike=12.0, spike_steps=10)
    unread = MetricsBuffer()
    losses = [jnp.asarray(loss) for loss in np.random.default_rng(0).lognormal(size=steps)]
    skipped = jnp.asarray(0.0)
    jax.block_until_ready(losses)
    begun = time.perf_counter()
    for number, loss in enumerate(losses, 1):
        unread.add(number, {"loss": loss, "skipped": skipped})
        for seen in unread.see(leave=2):
            watch.see(*seen)
    return (time.perf_counter() - begun) / steps


def digest_seconds(trees: Any, times: int = 5) -> float:
    """The digests of a state, once they are compiled."""
    digests.of_tree(trees)
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        digests.of_tree(trees)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


class _Blank:
    """A source whose pictures take no time."""

    keys = tuple(f"{i:06d}" for i in range(10_000))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Example:
        return _EXAMPLE


_EXAMPLE = Example(np.zeros((1, 1, 3), np.uint8), "", "", "", "")


def example_seconds(times: int = 300) -> tuple[float, float]:
    """Of one picture: what is asked of it, and the decoding of a JPEG of 256 pixels to 64."""
    source: Any = _Blank()
    with contextlib.closing(Rejects()) as rejects:
        begun = time.perf_counter()
        for i in range(len(source)):
            rejects.usable(source, i)
        looking = (time.perf_counter() - begun) / len(source)
    begun = time.perf_counter()
    for i in range(len(source)):
        source[i]
    looking -= (time.perf_counter() - begun) / len(source)

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    begun = time.perf_counter()
    for _ in range(times):
        decode(buffer.getvalue(), 64)
    return looking, (time.perf_counter() - begun) / times


if __name__ == "__main__":
    main()
