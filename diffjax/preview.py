"""Pictures of a run while it goes on: real images, what samples start from, and samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.data.transforms import downsample
from diffjax.evaluation.grids import enlarge, grid, write_png
from diffjax.experiment import StageModel, null_zeros, to_cond
from diffjax.latents import Codec
from diffjax.parallel import hosts
from diffjax.text.cache import TextTable
from diffjax.training.metrics import MetricsWriter

FOLDER = "previews"


def make_preview(
    config: ConfigDict,
    model: StageModel,
    settings: stages.SamplerSettings,
    source: Source,
    rejects: Rejects,
    table: TextTable | None,
    codec: Codec | None = None,
) -> Callable[[Any], np.ndarray]:
    """A function from averaged parameters to a picture: real images, what they start from, and samples.

    The prompts are the captions of pictures spread over the data set, so that the samples can stand beside
    the real ones; the same seeds are used each time.
    """
    shown = preview_places(config, source, rejects)
    examples = [source[i] for i in shown]
    factor = source.resolution // config.resolution
    real = np.stack([downsample(example.image, factor) for example in examples])
    labels = [source.labels[i] for i in shown] if "label" in config.conditions else []
    cond = to_cond(table, [example.caption for example in examples], labels)
    null = to_cond(table, [""] * len(shown)) if table is not None and config.text.null != "learned" else None
    if null is not None and config.text.null == "zeros":
        null = null_zeros(null)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), len(shown))
    low_res = None
    rows = [real]
    if config.low_res.resolution:
        ratio = config.resolution // config.low_res.resolution
        low_res = stages.downsample(stages.to_model_range(real), ratio)
        small = np.asarray(stages.to_pixels(low_res))
        rows.append(small.repeat(ratio, axis=1).repeat(ratio, axis=2))

    @jax.jit
    def run(params: Any) -> jax.Array:
        return stages.sample(model.stage, settings, params, cond, keys, low_res, null=null)

    def preview(params: Any) -> np.ndarray:
        images = run(params) if codec is None else codec.decode(run(params))
        shown = [*rows, hosts.gather(stages.to_pixels(images))]
        return grid([[enlarge(image, 64) for image in row] for row in shown])

    return preview


def preview_places(config: ConfigDict, source: Source, rejects: Rejects) -> list[int]:
    """The pictures whose captions are the prompts of previews, spread over the data set."""
    count = min(config.preview.count, len(source))
    return [rejects.usable(source, i * len(source) // count)[0] for i in range(count)]


def show_preview(picture: np.ndarray, step: int, workdir: Path, writer: MetricsWriter) -> None:
    """Write a preview as PNG and to TensorBoard, in the first of several processes."""
    if not hosts.is_first():
        return
    write_png(workdir / FOLDER / f"{step:08d}.png", picture, {"step": str(step)})
    writer.image(step, "samples", picture)
