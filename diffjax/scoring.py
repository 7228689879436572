"""What is sampled for a split and measured: ways of sampling, baselines, and pictures that are restored."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.cascade import Cascade
from diffjax.data.source import Source
from diffjax.diffusion import resizing
from diffjax.errors import UserError
from diffjax.evaluation.errorbars import mean_error
from diffjax.evaluation.features import Extractor, Features
from diffjax.evaluation.images import consistency, psnr, ssim
from diffjax.evaluation.report import Comparison
from diffjax.evaluation.retrieval import nearest_pictures
from diffjax.evaluation.tables import Result
from diffjax.measures import Reference, Scores, as_json, at, compare, from_json, see, share
from diffjax.parallel import hosts
from diffjax.report import write_text
from diffjax.samples import Asked, network_evaluations, sample_set, set_key
from diffjax.sweep import CONFIGURED, Variant
from diffjax.untrusted import read_json

FOLDER = "evaluation"
_SSIM_SIDE = 11

Log = Callable[[str], None]


class Task(NamedTuple):
    """What sets of samples of one split are measured against.

    Attributes:
      config: the cascade's configuration.
      folder: where samples and scores are kept.
      split: the split's name.
      source: its pictures.
      gallery: pictures at the base stage's resolution, and their concepts, for retrieval.
      extractor: the feature network, if there is one.
      reference: what features are compared with, if there is an extractor.
      log: receives lines about progress.
    """

    config: ConfigDict
    folder: Path
    split: str
    source: Source
    gallery: tuple[np.ndarray, list[str]]
    extractor: Extractor | None
    reference: Reference | None
    log: Log


def enlarged(images: np.ndarray, resolution: int, method: str) -> np.ndarray:
    """Images made larger without a network: uint8 `[n, r, r, 3] -> [n, resolution, resolution, 3]`.

    Args:
      images: the images.
      resolution: a multiple of theirs.
      method: "nearest" or "bilinear".
    """
    factor = resolution // images.shape[1]
    if method == "nearest":
        return images.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.asarray(stages.to_pixels(resizing.upsample(stages.to_model_range(images), factor)))


def score_variant(task: Task, variant: Variant, asked: Asked) -> list[Result]:
    """Sample a variant, and measure its images and, for the configured one, those of the baselines."""
    cascade, seed = variant.cascade, task.config.seed
    folder, parts = sampled(task, cascade, variant.samplers, asked)
    evaluations = [network_evaluations(item) for item in cascade.stages]
    configured = variant.name == CONFIGURED
    methods = ("bilinear", "nearest") if configured and task.config.evaluate.baselines else ()
    methods = methods if len(cascade.stages) > 1 else ()
    names = [variant.name, *(f"{cascade.stages[0].name} alone, {method}" for method in methods)]

    def measure() -> dict[str, Scores]:
        seen: dict[str, list[Features]] = {name: [] for name in names}
        base, kept = [], []
        for images in parts:
            base.append(images[0])
            if len(images) > 1:
                kept.append(consistency(images[-1], images[-2]))
            side = images[-1].shape[1]
            made = [images[-1], *(enlarged(images[0], side, method) for method in methods)]
            for name, array in zip(names, made, strict=True):
                if task.extractor is not None:
                    seen[name].append(see(task.extractor, array))
        own = retrieval_scores(task, np.concatenate(base), [task.source.concepts[i] for i in asked.places])
        if kept:
            own["consistency (dB)"] = mean_error(np.concatenate(kept))
        found = {name: _compared(task, features, seed) for name, features in seen.items()}
        return {**found, variant.name: {**found[variant.name], **own}}

    scores = _remembered(folder, names, task, measure)
    counts = [sum(evaluations), *([evaluations[0]] * len(methods))]
    return [
        Result(
            task.split,
            name,
            variant.changes if name == variant.name else {},
            len(asked.places),
            nfe,
            scores[name],
        )
        for name, nfe in zip(names, counts, strict=True)
    ]


def retrieval_scores(task: Task, images: np.ndarray, concepts: list[str]) -> Scores:
    """How often an image looks most like pictures of what its caption names; see `evaluation.retrieval`."""
    gallery, shown = task.gallery
    nearest = nearest_pictures(images, gallery)
    hits = np.asarray(shown, dtype=object)[nearest] == np.asarray(concepts, dtype=object)[:, None]
    return {"retrieval top1": share(hits[:, 0]), "retrieval top5": share(hits.any(axis=1))}


def score_restored(
    task: Task, cascade: Cascade, samplers: dict[str, Any], asked: Asked
) -> tuple[list[Result], Comparison | None]:
    """Restore real pictures from their low resolution, with super-resolution and without a network."""
    count = min(task.config.evaluate.num_restored, len(asked.places))
    if len(cascade.stages) < 2 or not count:
        return [], None
    chosen = [i * len(asked.places) // count for i in range(count)]
    some = Asked(*([column[i] for i in chosen] for column in asked))
    real = np.stack([at(task.source, i, cascade.stages[-1].stage.resolution) for i in some.places])
    low_res = np.stack([at(task.source, i, cascade.stages[0].stage.resolution) for i in some.places])
    rest = dataclasses.replace(cascade, stages=cascade.stages[1:])
    _, parts = sampled(task, rest, samplers, some, low_res)
    restored = np.concatenate([images[-1] for images in parts])
    side = real.shape[1]
    small, wide = (enlarged(low_res, side, method) for method in ("nearest", "bilinear"))
    nfe = sum(network_evaluations(item) for item in rest.stages)
    results = []
    for name, images, cost in (("restored", restored, nfe), ("bilinear", wide, 0), ("nearest", small, 0)):
        scores = {"PSNR (dB)": mean_error(psnr(images, real))}
        if side >= _SSIM_SIDE:
            scores["SSIM"] = mean_error(ssim(images, real))
        scores["consistency (dB)"] = mean_error(consistency(images, low_res))
        results.append(Result(task.split, f"real low-res, {name}", {}, count, cost, scores))
    items = [
        (caption, pictures)
        for caption, *pictures in zip(some.captions, small, wide, restored, real, strict=True)
    ]
    about = "Real pictures, made small and then large again: by super-resolution, and without a network."
    names = ["low-res", "bilinear", "super-resolution", "real"]
    return results, Comparison(f"Restored, {task.split}", about, names, _some(items, task), 1, 2)


def compared_pictures(task: Task, variant: Variant, asked: Asked) -> Comparison:
    """Samples beside the real pictures that have the same captions."""
    cascade = variant.cascade
    rows = min(task.config.evaluate.sheet_rows, len(asked.places))
    shown = {i * len(asked.places) // rows for i in range(rows)}
    _, parts = sampled(task, cascade, variant.samplers, asked)
    items: list[tuple[str, list[np.ndarray]]] = []
    start = 0
    side = cascade.stages[-1].stage.resolution
    for images in parts:
        for i in range(start, start + len(images[0])):
            if i in shown:
                own = [part[i - start] for part in images]
                real = at(task.source, asked.places[i], side)
                small = [enlarged(own[0][None], side, method)[0] for method in ("nearest", "bilinear")]
                items.append((asked.captions[i], [*(small if len(own) > 1 else []), own[-1], real]))
        start += len(images[0])
    names = ["low-res", "bilinear", "cascade", "real"] if len(cascade.stages) > 1 else ["sample", "real"]
    about = "Sampled from captions. The real picture has the same caption; nothing else of it was known."
    return Comparison(
        f"Samples, {task.split}", about, names, items, 0, len(names) - 2 if len(names) > 2 else 1
    )


def _some(items: list[Any], task: Task) -> list[Any]:
    rows = min(task.config.evaluate.sheet_rows, len(items))
    return [items[i * len(items) // rows] for i in range(rows)]


def sampled(
    task: Task, cascade: Cascade, samplers: dict[str, Any], asked: Asked, low_res: np.ndarray | None = None
) -> tuple[Path, Iterable[list[np.ndarray]]]:
    """Where a set of samples is kept, and its images in parts, as `sample_set` gives them."""
    seed, batch_size = task.config.seed, task.config.batch_size
    key = set_key(cascade, samplers, asked, seed, batch_size, low_res)
    folder = task.folder / f"{task.split}-{key}"
    settings = {"seed": seed, "batch_size": batch_size, "log": task.log, "low_res": low_res}
    return folder, sample_set(cascade, asked, folder, **settings)


def _compared(task: Task, seen: list[Features], seed: int) -> Scores:
    if task.extractor is None or task.reference is None:
        return {}
    logits = [part.logits for part in seen if part.logits is not None]
    joined = Features(np.concatenate([s.features for s in seen]), np.concatenate(logits) if logits else None)
    return compare(joined, task.extractor, task.reference, seed=seed)


def _remembered(
    folder: Path, names: list[str], task: Task, measure: Callable[[], dict[str, Scores]]
) -> dict[str, Scores]:
    """Scores from a file beside the samples, or measured and written there."""
    path = folder / f"scores-{task.reference.digest if task.reference else 'none'}.json"
    known: dict[str, Scores] | None = None
    try:
        kept = read_json(path)
        known = {name: from_json(kept[name]) for name in names}
    except (UserError, KeyError, ValueError, TypeError):
        known = None
    if hosts.anywhere(np.array(known is None)) or known is None:
        known = measure()
        if hosts.is_first():
            write_text(path, json.dumps({name: as_json(scores) for name, scores in known.items()}, indent=1))
    return known
