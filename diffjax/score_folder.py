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
from diffjax.judges import Suspects, judge, known_of, look, open_judges, together
from diffjax.measures import Scores, pictures, share
from diffjax.parallel import hosts
from diffjax.parallel.mesh import make_mesh
from diffjax.report import write_results
from diffjax.scoring import FOLDER, copied_pictures, write_sheet
from diffjax.untrusted import read_bytes

_BATCH = 256
_MAX_CAPTION_BYTES = 2**16


def score_folder(config: ConfigDict, workdir: Path) -> None:
    """Measure the pictures in `config.evaluate.folder` beside those of each split, and print a table.

    No stage needs to be trained: only its data and resolution are asked for. A picture is brought to that
    resolution as training pictures are. Where every picture `NAME.png` has its caption in `NAME.txt`, CLIP's
    score is measured too, and where those are captions of the split, caption retrieval.

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
    judges = open_judges(settings, make_mesh(**config.mesh), print)
    base = min(stages.values(), key=lambda c: c.resolution)
    captions = _captions(paths)
    print(f"{len(paths):,} pictures in {folder}, at {last.resolution} px.", flush=True)
    seen = together([look(judges, part) for part in _read(paths, last.resolution, last.data.limits)])
    results, train = [], _open(last, last.data.split)
    for split in settings.splits:
        source = train if split == last.data.split else _open(last, split)
        known = known_of(judges, settings, source, train, last.resolution, last, print)
        rows = settings.sheet_rows
        scores, suspects = judge(judges, known, seen, captions, count=rows, seed=config.seed)
        scores |= _retrieval(paths, captions, source, base.resolution, last.data.limits)
        results.append(Result(split, folder.name, {}, len(paths), 0, scores))
        if suspects:
            sheet = workdir / FOLDER / f"memorisation-folder-{folder.name}.png"
            _write_suspects(sheet, paths, suspects, train, last)  # the same for all splits
    if hosts.is_first():
        write_results(workdir / FOLDER, results, name=f"folder-{folder.name}")
    print(f"\n{tables.to_text(results)}\n\n{workdir / FOLDER / f'folder-{folder.name}.csv'}", flush=True)


def _open(config: ConfigDict, split: str) -> Source:
    source = build_source(config.data, split=split, log=print)
    return usable_examples(config, source, Rejects(), decode=True, log=print)


def _write_suspects(
    path: Path, paths: list[Path], suspects: Suspects, train: Source, stage: ConfigDict
) -> None:
    """The sheet of the pictures that look most like copies of training pictures."""
    numbers = [i for i, _, _ in suspects]
    (images,) = _read([paths[i] for i in numbers], stage.resolution, stage.data.limits)
    names = [path.name for path in paths]
    chosen = dict(zip(numbers, images, strict=True))
    write_sheet(path, copied_pictures(path.stem, train, suspects, chosen, names))


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


def _captions(paths: list[Path]) -> list[str]:
    """The captions of all pictures; empty if one has none."""
    texts = [path.with_suffix(".txt") for path in paths]
    if not all(text.is_file() for text in texts):
        return []
    return [read_bytes(text, _MAX_CAPTION_BYTES).decode("utf-8", "replace").strip() for text in texts]


def _retrieval(
    paths: list[Path], captions: list[str], source: Source, resolution: int, limits: ConfigDict
) -> Scores:
    """Caption retrieval among the split's pictures, where all captions are captions of it."""
    concepts = dict(zip(source.captions, source.concepts, strict=True))
    if not captions or not all(caption in concepts for caption in captions):
        return {}
    shown = [concepts[caption] for caption in captions]
    gallery = np.concatenate(list(pictures(source, resolution)))
    near = np.concatenate([nearest_pictures(part, gallery) for part in _read(paths, resolution, limits)])
    hits = np.asarray(source.concepts, dtype=object)[near] == np.asarray(shown, dtype=object)[:, None]
    return {"retrieval top1": share(hits[:, 0]), "retrieval top5": share(hits.any(axis=1))}
