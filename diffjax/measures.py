"""All measures of a set of images: its features in a stream, and what is said of them beside a reference."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data.checked import fingerprint
from diffjax.data.source import Source
from diffjax.data.transforms import downsample
from diffjax.errors import UserError
from diffjax.evaluation.distances import frechet_infinity, frechet_to, kid
from diffjax.evaluation.errorbars import Value, jackknife, mean_error
from diffjax.evaluation.features import Extractor, Features
from diffjax.evaluation.precision import precision_recall_density_coverage
from diffjax.evaluation.scores import inception_score
from diffjax.evaluation.statistics import Moments, Statistics, load_statistics, save_statistics
from diffjax.interop.features import open_extractor
from diffjax.parallel import hosts

Scores = dict[str, Value]
Log = Callable[[str], None]

# Measures of which less is better; of all others, more.
LESS_IS_BETTER = ("FD", "FID", "KID", "CMMD", "MMD", "LPIPS")

_GROUPS = 10  # of a jackknife
_NEIGHBOURS = 5
_BATCH = 256


class Reference(NamedTuple):
    """What images are compared with.

    Attributes:
      name: what it is, for people.
      digest: decides which results belong to it.
      statistics: mean and covariance of its features.
      features: `[n, width]`, or None where only the statistics are known.
    """

    name: str
    digest: str
    statistics: Statistics
    features: np.ndarray | None


def extractor_of(name: str, weights: str, mesh: Mesh | None, log: Log) -> Extractor | None:
    """The feature network that a configuration names; None where there is none, or its package is not there.

    Raises:
      UserError: there is no network of this name, or `weights` are given and cannot be read.
    """
    if not name:
        return None
    try:
        return open_extractor(name, weights, mesh)
    except UserError as error:
        if weights or "install" not in str(error):
            raise
        log(f"{error} Measured is what needs no such network.")
        return None


def pictures(source: Source, resolution: int, *, batch: int = _BATCH) -> Iterator[np.ndarray]:
    """The pictures of a source at a resolution, in parts: uint8 `[n, resolution, resolution, 3]`."""
    for start in range(0, len(source), batch):
        yield np.stack([at(source, i, resolution) for i in range(start, min(start + batch, len(source)))])


def at(source: Source, i: int, resolution: int) -> np.ndarray:
    """A picture of a source, brought to a resolution.

    Raises:
      UserError: that does not divide the source's.
    """
    if source.resolution % resolution:
        raise UserError(f"pictures of {source.resolution} px cannot be shown at {resolution} px.")
    return downsample(source[i].image, source.resolution // resolution)


def reference_for(
    settings: ConfigDict,
    source: Source,
    resolution: int,
    extractor: Extractor,
    stage_config: ConfigDict,
    log: Log,
) -> Reference:
    """What images of a split are compared with: the file `settings.reference`, or the split's pictures.

    Args:
      settings: `evaluate` of a cascade's configuration.
      source: the split's pictures.
      resolution: of the images.
      extractor: the feature network.
      stage_config: of a stage whose `data.cache_dir` keeps what is known of the pictures.
      log: receives a line where they must be looked at.

    Raises:
      UserError: the file is not usable.
    """
    if settings.reference:
        return given_reference(Path(settings.reference).expanduser(), extractor)
    cache_dir = Path(stage_config.data.cache_dir).expanduser()
    return reference_of(source, resolution, extractor, cache_dir, log)


def given_reference(path: Path, extractor: Extractor) -> Reference:
    """Statistics that a file holds, ours or another program's.

    Raises:
      UserError: it is no such file, or of other features.
    """
    statistics = load_statistics(path)
    if len(statistics.mean) != extractor.width or statistics.network not in ("", extractor.name):
        raise UserError(
            f"{path}: holds statistics of {len(statistics.mean)} features of {statistics.network or '?'}, "
            f"but {extractor.name} has {extractor.width}; choose the network of evaluate.features to fit."
        )
    digest = hashlib.sha256(statistics.mean.tobytes() + statistics.cov.tobytes()).hexdigest()[:16]
    return Reference(path.name, digest, statistics, None)


def reference_of(
    source: Source, resolution: int, extractor: Extractor, cache_dir: Path, log: Log
) -> Reference:
    """The pictures of a source: from files in `cache_dir`, or measured once and written there.

    Those are `NAME.npz`, statistics as other programs read them, and `NAME.npy`, the features.
    """
    pixels = hashlib.sha256()
    for part in (at(source, i, resolution) for i in range(0, len(source), max(1, len(source) // 64))):
        pixels.update(part.tobytes())  # of some: decoding all would take as long as the network does
    weights = params_digest(extractor.params)
    told = f"{fingerprint(source)} {resolution} {extractor.name} {weights} {pixels.hexdigest()}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    path = cache_dir / "evaluation" / f"{digest}.npz"
    name = f"{len(source):,} pictures of {source.name}"
    known = _cached(path, len(source), extractor.width)
    if hosts.anywhere(np.array(known is None)) or known is None:
        log(f"{extractor.name}: looking at {name}, {resolution} px.")
        features = np.concatenate([see(extractor, part).features for part in pictures(source, resolution)])
        moments = Moments(extractor.width).add(features)
        statistics = Statistics(moments.mean, moments.cov, moments.count, extractor.name)
        if hosts.is_first():
            save_statistics(path, statistics, extractor.name)
            _save(path.with_suffix(".npy"), features)
        known = statistics, features
    return Reference(name, digest, *known)


def params_digest(params: Any) -> str:
    """A digest of a network's parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _cached(path: Path, count: int, width: int) -> tuple[Statistics, np.ndarray] | None:
    try:
        features = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        statistics = load_statistics(path)
    except (OSError, ValueError, EOFError, UserError):
        return None
    fits = features.shape == (count, width) and features.dtype == np.float32 and len(statistics.mean) == width
    return (statistics, np.asarray(features)) if fits else None


def _save(path: Path, features: np.ndarray) -> None:
    try:
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, features, allow_pickle=False)
        path.with_suffix(".tmp").replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def see(extractor: Extractor, images: np.ndarray) -> Features:
    """Features of images that every process has in full; each of several looks at its part of them."""
    parts = jax.process_count()
    if parts == 1:
        return extractor(images)
    share = -(-len(images) // parts)
    # Filled up with copies, so that all parts are of one size.
    rows = np.minimum(np.arange(share) + share * jax.process_index(), len(images) - 1)
    found = multihost_utils.process_allgather(extractor(images[rows]), tiled=True)
    return Features(*(None if leaf is None else np.asarray(leaf)[: len(images)] for leaf in found))


def features_of(extractor: Extractor, parts: Iterable[np.ndarray]) -> Features:
    """Features of images that come in parts."""
    return joined([see(extractor, images) for images in parts])


def joined(parts: Sequence[Features]) -> Features:
    """Features of parts, at least one, as one."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(
        np.concatenate([part.features for part in parts]), np.concatenate(logits) if logits else None
    )


def compare(seen: Features, extractor: Extractor, reference: Reference, *, seed: int = 0) -> Scores:
    """Everything that features say of a set of images beside a reference.

    Fréchet distances and the inception score are of all images; what needs the reference's own features is
    left out where only its statistics are known, and the extrapolation where there are too few images for it.
    """
    features, name = seen.features, extractor.distance
    distance = frechet_to(reference.statistics)
    groups = min(_GROUPS, len(features) // 2)  # without one, there must be two examples left
    if groups > 1:
        scores = {name: jackknife(distance, features, groups=groups, seed=seed)}
    else:
        scores = {name: Value(distance(features), math.nan)}
    if len(features) >= 10 * extractor.width:  # below that it is no line, see there
        scores[f"{name} infinity"] = frechet_infinity(features, reference.statistics, seed=seed)
    if reference.features is not None:
        scores["KID"] = kid(features, reference.features)
        if min(len(features), len(reference.features)) > _NEIGHBOURS:
            found = precision_recall_density_coverage(reference.features, features, k=_NEIGHBOURS)
            scores |= {key: Value(*value) for key, value in found._asdict().items()}
    if seen.logits is not None and name.startswith("FID"):
        scores["inception score"] = inception_score(seen.logits)
    return scores


def share(hits: np.ndarray) -> Value:
    """A share of images and its standard error."""
    return mean_error(np.asarray(hits, np.float64))


def as_json(scores: Scores) -> dict[str, list[float | None]]:
    """Scores as JSON has them: `[value, error]`, None for what is not known."""
    return {key: [x if math.isfinite(x) else None for x in value] for key, value in scores.items()}


def from_json(values: dict[str, list[float | None]]) -> Scores:
    """The inverse of `as_json`.

    Raises:
      ValueError, TypeError: they are something else.
    """
    return {str(k): Value(*(math.nan if x is None else float(x) for x in v)) for k, v in values.items()}
