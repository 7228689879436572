"""What each stage makes of a split's own pictures: its denoising error, and bits per dimension."""

import hashlib
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.cascade import Cascade, TrainedStage
from diffjax.diffusion.schedules import logsnr
from diffjax.evaluation.tables import Result
from diffjax.held_out import bits_per_dimension, denoising_error
from diffjax.measures import Scores, at
from diffjax.parallel import hosts
from diffjax.parallel.rules import on_mesh
from diffjax.samples import fingerprint
from diffjax.scoring import Found, Task, remembered

LEVELS = (-8.0, -4.0, 0.0, 4.0, 8.0)
"""Log-SNR at which the error is measured, as far as a schedule reaches."""


def score_stages(task: Task, cascade: Cascade) -> list[Result]:
    """A result for each stage, of `evaluate.held_out.num_images` pictures spread over the split.

    A super-resolution stage is given the picture made small, with the noise that its sampler puts on it. Of
    latents there is the error alone. Several processes leave all of it out, and say so.
    """
    settings = task.config.evaluate.held_out
    count = min(settings.num_images, len(task.source))
    if not count:
        return []
    if jax.process_count() > 1:
        task.log("evaluate.held_out: left out, since it is measured in one process alone.")
        return []
    places = [i * len(task.source) // count for i in range(count)]
    results = []
    for item in cascade.stages:

        def measure(item: TrainedStage = item) -> Found:
            task.log(f"{task.split}: {item.name} looks at {count:,} pictures.")
            return Found({item.name: _scores(task, cascade, item, places)}, [])

        told = [item.step, fingerprint(item.params), item.settings.aug_level, places, task.config.seed]
        pixels = at(task.source, places[0], item.stage.resolution).tobytes()
        known = hashlib.sha256(json.dumps([*told, bool(settings.bits)]).encode() + pixels).hexdigest()[:16]
        path = task.folder / f"held-out-{task.split}-{item.name}-{known}.json"
        scores = remembered(path, [item.name], measure).scores[item.name]
        results.append(Result(task.split, f"real pictures, {item.name}", {}, count, 0, scores))
    return results


def _scores(task: Task, cascade: Cascade, item: TrainedStage, places: list[int]) -> Scores:
    stage, seed, aug_level = item.stage, task.config.seed, item.settings.aug_level
    least, most = np.asarray(logsnr(stage.schedule(jnp.array([1.0, 0.0]))))
    levels = [level for level in LEVELS if least <= level <= most]
    scores = Scores()
    batches = list(_batches(task, cascade, item, places))  # encoders are not to run on the stages' mesh
    with on_mesh(cascade.mesh, cascade.attention):
        errors = denoising_error(stage, item.params, batches, levels=levels, aug_level=aug_level, seed=seed)
        scores |= {f"error at log-SNR {level:g}": value for level, value in errors.items()}
        if task.config.evaluate.held_out.bits and stage.scale == 1:
            scores["bits per dimension"] = bits_per_dimension(
                stage, item.params, batches, aug_level=aug_level, seed=seed
            )
    return scores


def _batches(
    task: Task, cascade: Cascade, item: TrainedStage, places: list[int]
) -> Iterator[dict[str, np.ndarray]]:
    """Pictures of a split with all that the stage is told of them, as `stage.draw` wants them."""
    size = task.config.batch_size
    for start in range(0, len(places), size):
        rows = places[start : start + size]
        images = np.stack([at(task.source, i, item.stage.resolution) for i in rows])
        batch: dict[str, np.ndarray] = {"image": images}
        if item.codec is not None:
            key = jax.random.fold_in(jax.random.key(task.config.seed), start)
            with on_mesh(cascade.mesh, cascade.attention):
                latents = item.codec.encode(images, key)
            batch = {"latent": hosts.gather(latents)}
        if "text" in item.stage.conditions and cascade.encoder is not None:
            captions = [task.source.captions[i] for i in rows]
            text = cascade.encoder.encode(captions, length=cascade.text_length)
            batch |= {"text": text.states, "mask": text.mask, "pooled": text.pooled}
        if "label" in item.stage.conditions:
            batch["label"] = np.asarray([task.source.labels[i] for i in rows], np.int32)
        yield batch
