"""Images that are sampled to be measured: which ones, and kept in files so that none is made twice."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import stage as stages
from diffjax.cascade import Cascade, TrainedStage, encode_prompts, generate, image_keys
from diffjax.errors import UserError
from diffjax.flops import model_flops
from diffjax.nn.conditioning import Cond
from diffjax.parallel import hosts

Log = Callable[[str], None]


class Asked(NamedTuple):
    """The images that are asked for: captions of a source, each as often as it takes.

    Attributes:
      places: which picture of the source has the caption, `n` of them.
      captions: the captions.
      numbers: which image of the same caption it is.
    """

    places: list[int]
    captions: list[str]
    numbers: list[int]


def ask(captions: Sequence[str], count: int) -> Asked:
    """`count` images of captions spread over a source; every caption once before any comes again."""
    size = len(captions)
    places = [i * size // count if count <= size else i % size for i in range(count)]
    return Asked(places, [captions[i] for i in places], [i // size for i in range(count)])


def set_key(
    cascade: Cascade,
    samplers: dict[str, Any],
    asked: Asked,
    seed: int,
    batch_size: int,
    low_res: np.ndarray | None = None,
) -> str:
    """A digest of all that decides the images of a set.

    Args:
      cascade: the stages.
      samplers: how each is sampled, as JSON has it.
      asked: the images.
      seed: of all chance.
      batch_size: images in a file.
      low_res: what the first stage starts from, if anything.
    """
    given = "" if low_res is None else hashlib.sha256(low_res.tobytes()).hexdigest()
    trained = [
        (item.name, item.step, fingerprint(item.params), samplers[item.name]) for item in cascade.stages
    ]
    told = json.dumps([trained, asked.captions, asked.numbers, seed, batch_size, given], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@jax.jit
def _largest(params: Any) -> jax.Array:
    return jnp.stack([jnp.max(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(params) if leaf.size])


def fingerprint(params: Any) -> str:
    """A digest of parameters, the same for any layout over devices: of the largest value of each array."""
    return hashlib.sha256(np.asarray(_largest(params)).tobytes()).hexdigest()[:16]


def sample_set(
    cascade: Cascade,
    asked: Asked,
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    log: Log,
    low_res: np.ndarray | None = None,
) -> Iterator[list[np.ndarray]]:
    """Sample the images that are asked for, or find them in files, a batch at a time.

    Every batch is written as it is made, one `.npy` file for each stage, so that a run that was stopped
    goes on with what is missing. What an image looks like does not depend on the others of its batch.

    Args:
      cascade: the stages.
      asked: the images.
      folder: of this set alone, see `set_key`.
      seed: of all chance.
      batch_size: images at a time, over all devices, and in each file.
      log: receives a line about what is to be done.
      low_res: uint8 images that the first stage starts from, if it is one of super-resolution.

    Yields:
      for each stage, its images of a batch: uint8 `[n, resolution, resolution, 3]`, in the order of `asked`.
    """
    count = len(asked.captions)
    starts = range(0, count, batch_size)
    found = [_read(cascade, folder, start, min(batch_size, count - start)) for start in starts]
    # All processes must sample the same batches together.
    missing = hosts.anywhere(np.array([images is None for images in found]))
    if missing.any():
        have = sum(
            min(batch_size, count - start) for start, gone in zip(starts, missing, strict=True) if not gone
        )
        log(f"Sampling {count - have:,} images" + (f"; {have:,} are there." if have else "."))
        cond = encode_prompts(cascade, asked.captions, log)
        keys = image_keys(seed, asked.captions, asked.numbers)
    for start, images, absent in zip(starts, found, missing, strict=True):
        if absent or images is None:
            rows = slice(start, start + batch_size)
            part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], cond)
            start_from = None if low_res is None else low_res[rows]
            images = generate(cascade, part, keys[rows], batch_size=batch_size, low_res=start_from)
            if hosts.is_first():
                _write(cascade, folder, start, images)
        yield [np.asarray(array) for array in images]


def _path(folder: Path, start: int, item: TrainedStage) -> Path:
    return folder / f"{start:06d}-{item.name}.npy"


def _read(cascade: Cascade, folder: Path, start: int, count: int) -> list[np.ndarray] | None:
    """The images of a batch from their files, not yet in memory; None if one is not there as it should be."""
    found = []
    for item in cascade.stages:
        try:
            images = np.load(_path(folder, start, item), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        side = item.stage.resolution
        if images.dtype != np.uint8 or images.shape != (count, side, side, 3):
            return None
        found.append(images)
    return found


def _write(cascade: Cascade, folder: Path, start: int, images: list[np.ndarray]) -> None:
    for item, array in zip(cascade.stages, images, strict=True):
        path = _path(folder, start, item)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".tmp").open("wb") as file:
                np.save(file, array, allow_pickle=False)
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}.") from error


def network_evaluations(item: TrainedStage) -> int:
    """How often a stage's network looks at an image while it is sampled; both passes of guidance count.

    Counted in the program, with a network that is a single convolution: nothing else in it is one.
    """
    ratio = item.stage.resolution // item.stage.low_res if item.stage.low_res else 1
    side = ratio * item.stage.scale
    kernel = jnp.zeros((1, 1, item.stage.channels, item.stage.channels * (2 if item.stage.vlb_weight else 1)))

    def net(params: Any, x: jax.Array, level: jax.Array, cond: Cond) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    low_res = jnp.zeros((1, 1, 1, 3)) if item.stage.low_res else None
    stage = dataclasses.replace(
        item.stage, net=net, resolution=side, low_res=1 if item.stage.low_res else 0, conditions=()
    )

    def run(keys: jax.Array) -> jax.Array:
        return stages.sample(stage, item.settings, None, Cond(), keys, low_res)

    once = 2 * kernel.size * ratio**2
    return model_flops(run, jax.random.split(jax.random.key(0), 1)).conv // once
