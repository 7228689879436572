"""What is sampled for a split and measured: ways of sampling, baselines, and pictures that are restored."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from diffjax.evaluation.grids import sheet, write_png
from diffjax.evaluation.images import consistency, psnr, ssim
from diffjax.evaluation.report import Comparison
from diffjax.evaluation.retrieval import nearest_pictures
from diffjax.evaluation.tables import Result
from diffjax.judges import Judges, Known, Seen, Suspects, digest, judge, look, together, variety
from diffjax.measures import Scores, as_json, at, from_json, share
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
      train: those that were trained on.
      gallery: pictures at the base stage's resolution, and their concepts, for retrieval.
      judges: the networks that look at images.
      known: what images are compared with.
      log: receives lines about progress.
    """

    config: ConfigDict
    folder: Path
    split: str
    source: Source
    train: Source
    gallery: tuple[np.ndarray, list[str]]
    judges: Judges
    known: Known
    log: Log


class Found(NamedTuple):
    """What was measured.

    Attributes:
      scores: by the name of the set of images.
      suspects: of the first set, those that look most like copies of training pictures.
    """

    scores: dict[str, Scores]
    suspects: Suspects


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


def score_variant(task: Task, variant: Variant, asked: Asked) -> tuple[list[Result], Suspects]:
    """Sample a variant, and measure its images and, for the configured one, those of the baselines.

    Returns:
      the results, and the variant's images that look most like copies of training pictures.
    """
    cascade = variant.cascade
    folder, parts = sampled(task, cascade, variant.samplers, asked)
    evaluations = [network_evaluations(item) for item in cascade.stages]
    configured = variant.name == CONFIGURED
    methods = ("bilinear", "nearest") if configured and task.config.evaluate.baselines else ()
    methods = methods if len(cascade.stages) > 1 else ()
    names = [variant.name, *(f"{cascade.stages[0].name} alone, {method}" for method in methods)]
    captions = asked.captions if cascade.encoder is not None else ()

    def measure() -> Found:
        seen: dict[str, list[Seen]] = {name: [] for name in names}
        base, last, kept = [], [], []
        for images in parts:
            base.append(images[0])
            last.append(images[-1])
            if len(images) > 1:
                kept.append(consistency(images[-1], images[-2]))
            side = images[-1].shape[1]
            made = [images[-1], *(enlarged(images[0], side, method) for method in methods)]
            for name, array in zip(names, made, strict=True):
                seen[name].append(look(task.judges, array))
        whole = {name: together(parts) for name, parts in seen.items()}
        found = {name: judged(task, whole[name], captions) for name in names}
        own = variety(task.judges, whole[variant.name], last, asked.places, asked.numbers)
        own |= retrieval_scores(task, np.concatenate(base), [task.source.concepts[i] for i in asked.places])
        if kept:
            own["consistency (dB)"] = mean_error(np.concatenate(kept))
        scores = {name: part for name, (part, _) in found.items()}
        return Found({**scores, variant.name: {**scores[variant.name], **own}}, found[variant.name][1])

    path = folder / f"scores-{digest(task.judges, task.known)}.json"
    scores, suspects = remembered(path, names, measure)
    counts = [sum(evaluations), *([evaluations[0]] * len(methods))]
    results = [
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
    return results, suspects


def judged(task: Task, seen: Seen, captions: Sequence[str]) -> tuple[Scores, Suspects]:
    """What the networks say of images of a split."""
    count, seed = task.config.evaluate.sheet_rows, task.config.seed
    return judge(task.judges, task.known, seen, captions, count=count, seed=seed)


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
        if task.judges.lpips is not None:
            scores[task.judges.lpips.name] = mean_error(task.judges.lpips(images, real))
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


def copied_pictures(
    split: str,
    train: Source,
    suspects: Suspects,
    images: Mapping[int, np.ndarray],
    captions: Sequence[str],
) -> Comparison:
    """Images beside the training pictures that are nearest to them, most suspicious first.

    Args:
      split: whose captions the images were made for.
      train: the training pictures.
      suspects: which images, and which training pictures.
      images: those images, by their numbers.
      captions: of all images, or other names of them.
    """
    items = [
        (f"{ratio:.2f}  {captions[i]}", [images[i], at(train, j, images[i].shape[0])])
        for i, j, ratio in suspects
    ]
    about = (
        "The images that look most like copies, each with its nearest training picture in the network's "
        "features. The number is its distance over the mean of those to the next 49: 0 for a copy, near 1 "
        "for what is like many."
    )
    names = ["image", "in training"]
    return Comparison(f"Nearest training pictures, {split}", about, names, items, 0, 1)


def write_sheet(path: Path, comparison: Comparison, **about: str) -> None:
    """Write a comparison as a picture; `about` is kept in its metadata. The first process does it."""
    if hosts.is_first():
        side = max(comparison.items[0][1][-1].shape[0], 96)
        write_png(path, sheet(comparison.names, comparison.items, side=side, blocks=2), about)


def chosen_images(parts: Iterable[list[np.ndarray]], numbers: Iterable[int]) -> dict[int, np.ndarray]:
    """Some of the last stage's images of a set that comes in parts, by their numbers."""
    wanted, found, start = set(numbers), dict[int, np.ndarray](), 0
    for images in parts:
        found |= {start + i: image for i, image in enumerate(images[-1]) if start + i in wanted}
        start += len(images[-1])
    return found


def remembered(path: Path, names: Sequence[str], measure: Callable[[], Found]) -> Found:
    """What was measured, from a file, or measured and written there."""
    known: Found | None = None
    try:
        kept = read_json(path)
        scores = {name: from_json(kept["scores"][name]) for name in names}
        known = Found(scores, [(int(i), int(j), float(ratio)) for i, j, ratio in kept["suspects"]])
    except (UserError, KeyError, ValueError, TypeError):
        known = None
    if hosts.anywhere(np.array(known is None)) or known is None:
        known = measure()
        if hosts.is_first():
            scores_json = {name: as_json(scores) for name, scores in known.scores.items()}
            write_text(path, json.dumps({"scores": scores_json, "suspects": known.suspects}, indent=1))
    return known
