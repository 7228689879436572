"""The networks that look at images in mode `evaluate`, and all that they say of a set of them together."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data.source import Source
from diffjax.evaluation.distances import cmmd, unit
from diffjax.evaluation.errorbars import mean_error
from diffjax.evaluation.features import Extractor, Features, PairDistance
from diffjax.evaluation.memorisation import memorisation
from diffjax.evaluation.scores import clip_score, diversity, r_precision
from diffjax.interop.clip_towers import Clip, open_clip
from diffjax.interop.features import open_lpips
from diffjax.measures import (
    Reference,
    Scores,
    compare,
    extractor_of,
    joined,
    params_digest,
    reference_for,
    reference_of,
    see,
)

_WRONG = 99  # captions that R-precision tells from the right one
_PER_PROMPT = 8  # samples of a prompt whose pairs are looked at, at most
_VERSION = "2"  # part of what results depend on; to be changed with what is measured

Log = Callable[[str], None]
Suspects = list[tuple[int, int, float]]
"""(which image, its nearest training picture, the ratio of distances), most suspicious first."""


class Judges(NamedTuple):
    """Frozen networks; None where a configuration names none.

    Attributes:
      features: for distances, precision and memorisation.
      clip: for captions.
      lpips: for pairs of pictures.
    """

    features: Extractor | None = None
    clip: Clip | None = None
    lpips: PairDistance | None = None


class Known(NamedTuple):
    """What images of a split are compared with; None where it is not known.

    Attributes:
      reference: the split's pictures, or a file's statistics.
      training: the pictures that were trained on, in the same features.
      clip: the split's pictures, in CLIP's.
    """

    reference: Reference | None = None
    training: Reference | None = None
    clip: Reference | None = None


class Seen(NamedTuple):
    """What the networks see in images, `[n, width]` each; None where there is no such network."""

    features: Features | None
    clip: np.ndarray | None


def open_judges(settings: ConfigDict, mesh: Mesh, log: Log) -> Judges:
    """The networks that `evaluate` of a cascade's configuration names.

    Raises:
      UserError: one of them cannot be opened.
    """
    return Judges(
        extractor_of(settings.features, settings.weights, mesh, log),
        open_clip(Path(settings.clip).expanduser(), mesh) if settings.clip else None,
        open_lpips("alex", str(Path(settings.lpips).expanduser()), mesh) if settings.lpips else None,
    )


def known_of(
    judges: Judges,
    settings: ConfigDict,
    source: Source,
    train: Source,
    resolution: int,
    stage_config: ConfigDict,
    log: Log,
) -> Known:
    """What images of a split are compared with.

    Args:
      judges: the networks.
      settings: `evaluate` of a cascade's configuration.
      source: the split's pictures.
      train: the training pictures; `source` itself where it is them.
      resolution: of the images.
      stage_config: of a stage whose `data.cache_dir` keeps what is known of the pictures.
      log: receives a line where they must be looked at.

    Raises:
      UserError: `settings.reference` is not usable.
    """
    cache_dir = Path(stage_config.data.cache_dir).expanduser()
    reference = training = of_clip = None
    if judges.features is not None:
        reference = reference_for(settings, source, resolution, judges.features, stage_config, log)
        if reference.features is not None:
            other = train is not source
            training = (
                reference_of(train, resolution, judges.features, cache_dir, log) if other else reference
            )
    if judges.clip is not None and not settings.reference:
        of_clip = reference_of(source, resolution, judges.clip.see, cache_dir, log)
    return Known(reference, training, of_clip)


def digest(judges: Judges, known: Known) -> str:
    """Of all that scores of the same images depend on."""
    told = [_VERSION, *(reference.digest if reference else "" for reference in known)]
    told += [judges.features.name if judges.features else "", judges.clip.digest if judges.clip else ""]
    told += [params_digest(judges.lpips.params) if judges.lpips else ""]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]


def look(judges: Judges, images: np.ndarray) -> Seen:
    """What the networks see in images that every process has in full."""
    return Seen(
        None if judges.features is None else see(judges.features, images),
        None if judges.clip is None else see(judges.clip.see, images).features,
    )


def together(parts: Sequence[Seen]) -> Seen:
    """What was seen in parts, at least one."""
    features = [part.features for part in parts if part.features is not None]
    clip = [part.clip for part in parts if part.clip is not None]
    return Seen(joined(features) if features else None, np.concatenate(clip) if clip else None)


def judge(
    judges: Judges, known: Known, seen: Seen, captions: Sequence[str], *, count: int, seed: int
) -> tuple[Scores, Suspects]:
    """All that is said of a set of images: beside real pictures, training pictures and captions.

    Args:
      judges: the networks.
      known: what images are compared with.
      seen: what they saw.
      captions: of the images; empty if they have none.
      count: how many of the most suspicious images are named.
      seed: of all chance.
    """
    scores, suspects = Scores(), Suspects()
    if judges.features is not None and seen.features is not None:
        if known.reference is not None:
            scores |= compare(seen.features, judges.features, known.reference, seed=seed)
        copied, suspects = copies(seen.features.features, known.training, count)
        scores |= copied
    if judges.clip is not None and seen.clip is not None:
        scores |= alignment(judges.clip, seen.clip, captions, seed=seed)
        if known.clip is not None and known.clip.features is not None:
            scores[judges.clip.distance] = cmmd(seen.clip, known.clip.features)
    return scores, suspects


def judge_real(judges: Judges, known: Known, captions: Sequence[str], *, seed: int) -> Scores:
    """The same of the split's pictures themselves, as far as it says something: what others are to be like.

    Of the training pictures it is not asked whether they are copies.
    """
    scores = Scores()
    reference = known.reference
    if reference is not None and reference.features is not None and known.training is not reference:
        scores |= copies(reference.features, known.training, 0)[0]
    if judges.clip is not None and known.clip is not None and known.clip.features is not None:
        scores |= alignment(judges.clip, known.clip.features, captions, seed=seed)
    return scores


def copies(features: np.ndarray, training: Reference | None, count: int) -> tuple[Scores, Suspects]:
    """Whether images are copies of training pictures, and the `count` most suspicious ones."""
    if training is None or training.features is None or len(training.features) < 2:
        return {}, []
    found = memorisation(features, training.features)
    return {"memorised": found.share, "nearest ratio": mean_error(found.to_others)}, found.pairs(count)


def alignment(clip: Clip, images: np.ndarray, captions: Sequence[str], *, seed: int) -> Scores:
    """How well images, as CLIP sees them, go with their captions; nothing where there are none."""
    if not len(captions):
        return {}
    texts = clip.read(captions)
    scores = {"CLIP score": clip_score(images, texts)}
    if len(set(captions)) > _WRONG:
        scores["R-precision"] = r_precision(images, texts, captions, wrong=_WRONG, seed=seed)
    return scores


def variety(
    judges: Judges, seen: Seen, parts: Sequence[np.ndarray], prompts: Sequence[int], numbers: Sequence[int]
) -> Scores:
    """How different the samples of a prompt are, of the first eight of each; nothing where each has one.

    Args:
      judges: the networks.
      seen: what they saw in the images.
      parts: the images, in parts.
      prompts: which prompt each image belongs to.
      numbers: which of that prompt's images it is.
    """
    if not any(numbers):
        return {}
    chosen = [i for i, number in enumerate(numbers) if number < _PER_PROMPT]
    asked = [prompts[i] for i in chosen]
    scores = Scores()
    if seen.features is not None:
        unit_length = unit(seen.features.features[chosen])
        scores["diversity"] = diversity(unit_length, asked, lambda a, b: 1.0 - (a * b).sum(axis=1))
    if judges.lpips is not None:
        images = np.concatenate(parts)[chosen]
        scores[f"diversity, {judges.lpips.name}"] = diversity(images, asked, judges.lpips)
    return scores
