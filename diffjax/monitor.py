"""Measures of a stage while it is trained: those of mode `evaluate`, of few samples of the stage alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.evaluation.errorbars import mean_error
from diffjax.evaluation.images import psnr
from diffjax.experiment import StageModel, null_zeros, to_cond
from diffjax.latents import Codec
from diffjax.measures import Scores, at, compare, extractor_of, features_of, reference_of
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_parts, batch_sharding
from diffjax.parallel.rules import on_mesh
from diffjax.text.cache import TextTable

_BATCH = 64  # at most


def make_evaluation(
    config: ConfigDict,
    model: StageModel,
    settings: stages.SamplerSettings,
    source: Source,
    rejects: Rejects,
    table: TextTable | None,
    mesh: Mesh,
    codec: Codec | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Callable[[Any], dict[str, float]]:
    """A function from averaged parameters to measures, by the names that TensorBoard shows them under.

    The prompts are captions spread over the data set, the seeds the same each time. Super-resolution
    starts from real pictures made small, and is measured by PSNR besides. All processes must call it.

    Args:
      config: a stage's configuration; `eval` says how much is measured, and in which features.
      model: the stage.
      settings: how to sample it, from `eval.sampler`.
      source: its pictures.
      rejects: those that cannot be used.
      table: their encoded captions, if it knows captions.
      mesh: over which a batch is divided.
      codec: of latents.
      log: receives a line where real pictures must be looked at.
    """
    size = batch_parts(mesh) * max(1, _BATCH // batch_parts(mesh))
    count = min(config.eval.num_images, len(source))
    places = [rejects.usable(source, i * len(source) // count)[0] for i in range(count)]
    place = batch_sharding(mesh)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 3), count)
    extractor = extractor_of(config.eval.features, config.eval.weights, mesh, log)
    reference = None
    if extractor is not None:
        cache_dir = Path(config.data.cache_dir).expanduser()
        reference = reference_of(source, config.resolution, extractor, cache_dir, log)

    @jax.jit
    def run(params: Any, cond: Any, keys: jax.Array, low_res: Any, null: Any) -> jax.Array:
        return stages.sample(model.stage, settings, params, cond, keys, low_res, null=null)

    def cond_of(rows: np.ndarray) -> tuple[Any, Any]:
        chosen = [places[i] for i in rows]
        labels = [source.labels[i] for i in chosen] if "label" in config.conditions else []
        cond = to_cond(table, [source.captions[i] for i in chosen], labels)
        if table is None or config.text.null == "learned":
            return cond, None
        null = to_cond(table, [""] * len(chosen))
        return cond, null_zeros(null) if config.text.null == "zeros" else null

    def samples(params: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Samples in parts, and which of the chosen pictures they belong to."""
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)  # the last batch is filled up
            cond, null = hosts.spread(cond_of(rows), place)
            low_res = None
            if config.low_res.resolution:
                small = np.stack([at(source, places[i], config.low_res.resolution) for i in rows])
                low_res = hosts.spread(np.asarray(stages.to_model_range(small)), place)
            with on_mesh(mesh, config.attention):
                images = run(params, cond, hosts.spread(keys[rows], place), low_res, null)
                images = images if codec is None else codec.decode(images)
            wanted = min(size, count - start)
            yield hosts.gather(stages.to_pixels(images))[:wanted], rows[:wanted]

    def evaluate(params: Any) -> dict[str, float]:
        made = list(samples(params))
        scores: Scores = {}
        if extractor is not None and reference is not None:
            seen = features_of(extractor, (images for images, _ in made))
            scores = compare(seen, extractor, reference, seed=config.seed)
        if config.low_res.resolution:
            near = [
                psnr(images, np.stack([at(source, places[i], config.resolution) for i in rows]))
                for images, rows in made
            ]
            scores["PSNR"] = mean_error(np.concatenate(near))
        return {f"eval/{name}": value.value for name, value in scores.items()}

    return evaluate
