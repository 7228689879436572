"""Mode `evaluate` of a folder of pictures that any program may have made."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffjax import run_config
from diffjax.cascade import stage_workdir
from diffjax.config import nearest
from diffjax.data.decode import SUFFIXES, Limits, PictureError, decode
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.evaluation import tables
from diffjax.evaluation.retrieval import nearest_pictures
from diffjax.evaluation.tables import Result
from diffjax.experiment import build_source, usable_examples
from diffjax.measures import Scores, compare, extractor_of, features_of, pictures, reference_for, share
from diffjax.parallel import hosts
from diffjax.parallel.mesh import make_mesh
from diffjax.report import write_results
from diffjax.scoring import FOLDER
from diffjax.untrusted import read_bytes

_BATCH = 256
_MAX_CAPTION_BYTES = 2**16


def score_folder(config: ConfigDict, workdir: Path) -> None:
    """Measure the pictures in `config.evaluate.folder` beside those of each split, and print a table.

    No stage needs to be trained: only its data and resolution are asked for. A picture is brought to that
    resolution as training pictures are. Where every picture `NAME.png` has a caption of the split in
    `NAME.txt`, caption retrieval is measured too.

    Raises:
      UserError: there are no pictures, or one cannot be read.
    """
    settings = config.evaluate
    folder = Path(settings.folder).expanduser()
    stages = _stage_configs(config, workdir)
    last = stages[settings.stage] if settings.stage else max(stages.values(), key=lambda c: c.resolution)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise UserError(f"evaluate.folder={folder}: holds {len(paths)} pictures; expected two or more.")
    mesh = make_mesh(**config.mesh)
    extractor = extractor_of(settings.features, settings.weights, mesh, print)
    base = min(stages.values(), key=lambda c: c.resolution)
    results = []
    print(f"{len(paths):,} pictures in {folder}, at {last.resolution} px.", flush=True)
    seen = (
        None if extractor is None else features_of(extractor, _read(paths, last.resolution, last.data.limits))
    )
    for split in settings.splits:
        source = build_source(last.data, split=split, log=print)
        source = usable_examples(last, source, Rejects(), decode=True, log=print)
        scores: Scores = {}
        if extractor is not None and seen is not None:
            reference = reference_for(settings, source, last.resolution, extractor, last, print)
            scores = compare(seen, extractor, reference, seed=config.seed)
        scores |= _retrieval(paths, source, base.resolution, last.data.limits)
        results.append(Result(split, folder.name, {}, len(paths), 0, scores))
    if hosts.is_first():
        write_results(workdir / FOLDER, results, name=f"folder-{folder.name}")
    print(f"\n{tables.to_text(results)}\n\n{workdir / FOLDER / f'folder-{folder.name}.csv'}", flush=True)


def _stage_configs(config: ConfigDict, workdir: Path) -> dict[str, ConfigDict]:
    """The configurations of all stages, trained or not."""
    found = {}
    for name, entry in config.stages.items():
        found[name] = (
            entry.train if "train" in entry else run_config.load(stage_workdir(config, name, workdir))
        )
    if config.evaluate.stage and config.evaluate.stage not in found:
        raise UserError(
            f"evaluate.stage={config.evaluate.stage!r} does not exist; "
            f"{nearest(config.evaluate.stage, found)}"
        )
    return found


def _read(paths: list[Path], resolution: int, limits: ConfigDict) -> Iterator[np.ndarray]:
    """Pictures in parts: uint8 `[n, resolution, resolution, 3]`."""
    allowed = Limits(**limits)
    for start in range(0, len(paths), _BATCH):
        found = []
        for path in paths[start : start + _BATCH]:
            try:
                found.append(decode(read_bytes(path, allowed.max_bytes), resolution, limits=allowed))
            except PictureError as error:
                raise UserError(f"{path}: {error}.") from error
        yield np.stack(found)


def _retrieval(paths: list[Path], source: Source, resolution: int, limits: ConfigDict) -> Scores:
    """Caption retrieval among the split's pictures, where the captions of all pictures are known."""
    concepts = dict(zip(source.captions, source.concepts, strict=True))
    shown = []
    for path in paths:
        text = path.with_suffix(".txt")
        caption = read_bytes(text, _MAX_CAPTION_BYTES).decode("utf-8", "replace") if text.is_file() else ""
        if caption.strip() not in concepts:
            return {}
        shown.append(concepts[caption.strip()])
    gallery = np.concatenate(list(pictures(source, resolution)))
    near = np.concatenate([nearest_pictures(part, gallery) for part in _read(paths, resolution, limits)])
    hits = np.asarray(source.concepts, dtype=object)[near] == np.asarray(shown, dtype=object)[:, None]
    return {"retrieval top1": share(hits[:, 0]), "retrieval top5": share(hits.any(axis=1))}
