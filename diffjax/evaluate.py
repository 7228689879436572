"""Mode `evaluate`: samples of a cascade beside real pictures, and how often they show what was asked for."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax import workdir as workdirs
from diffjax.cascade import Cascade, encode_prompts, generate, image_keys, open_cascade
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.data.transforms import downsample
from diffjax.diffusion import resizing
from diffjax.errors import UserError
from diffjax.evaluation.grids import sheet, write_png
from diffjax.evaluation.retrieval import Retrieval, nearest_pictures, retrieval, shuffled
from diffjax.experiment import build_source, usable_examples
from diffjax.parallel import hosts
from diffjax.parallel.mesh import check_batch

RESULTS = "evaluation.json"


class SplitResult(NamedTuple):
    """What came out for one split of the data.

    Attributes:
      score: retrieval of the prompts' concepts.
      control: the same samples scored against shuffled concepts.
      sheet: where the sheet was written.
    """

    score: Retrieval
    control: Retrieval
    sheet: str


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Sample captions of each split once, write a sheet of each, and print caption retrieval.

    Retrieval looks for each base sample's nearest pictures (mean squared pixel distance at the base
    resolution) among the base stage's training pictures and those of the split. The last lines printed are
    the first split's score and its sheet. A repeated call on the same checkpoints prints what is known.
    """
    with workdirs.hold(workdir, first=hosts.is_first()):
        cascade = open_cascade(config, workdir)
        check_batch(config.batch_size, cascade.mesh)
        identity = _identity(config, cascade)
        results = _known(workdir, identity)
        missing = hosts.anywhere(np.array(results is None))  # in one process, and all sample again
        if results is None or missing:
            train = _open(cascade)
            results = {
                split: evaluate_split(config, cascade, train, split, workdir)
                for split in config.evaluate.splits
            }
            if hosts.is_first():
                _remember(workdir, identity, results)
    for split, result in reversed(results.items()):
        name = "retrieval" if split == config.evaluate.splits[0] else f"{split}: retrieval"
        score, control = result.score, result.control
        print(
            f"{name} top1 {score.top1:.1%} top5 {score.top5:.1%} "
            f"(control top1 {control.top1:.1%} top5 {control.top5:.1%})"
        )
        print(workdir / result.sheet, flush=True)


def evaluate_split(
    config: ConfigDict, cascade: Cascade, train: Source, split: str, workdir: Path
) -> SplitResult:
    """Sample captions of a split, score them and write their sheet."""
    base, final = cascade.stages[0], cascade.stages[-1]
    data = base.config.data
    source = train if split == data.split else _open(cascade, split)
    count = min(config.evaluate.num_prompts, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    captions = [source.captions[i] for i in chosen]
    concepts = [source.concepts[i] for i in chosen]

    print(f"Sampling {count} captions of {source.name}.", flush=True)
    cond = encode_prompts(cascade, captions, print)
    keys = image_keys(config.seed, captions, [0] * count)
    images = generate(cascade, cond, keys, batch_size=config.batch_size)

    sources = (train,) if source is train else (train, source)
    gallery = np.stack([_at(part, i, base.stage.resolution) for part in sources for i in range(len(part))])
    gallery_concepts = [concept for part in sources for concept in part.concepts]
    nearest = nearest_pictures(images[0], gallery)
    score = retrieval(nearest, gallery_concepts, concepts)
    control = retrieval(nearest, gallery_concepts, shuffled(concepts, config.seed))

    rows = min(config.evaluate.sheet_rows, count)
    shown = [i * count // rows for i in range(rows)]
    name = f"sheet-{split}.png"
    picture = _sheet(cascade, source, images, [(i, chosen[i]) for i in shown])
    if hosts.is_first():
        write_png(workdir / name, picture, {"seed": str(config.seed), "split": split})
        _write_all(workdir / f"samples-{split}", images[-1], captions, final.name)
    return SplitResult(score, control, name)


def _open(cascade: Cascade, split: str | None = None) -> Source:
    """The pictures of a split that can be used; all are decoded for retrieval anyway."""
    config = cascade.stages[0].config
    source = build_source(config.data, split=split, log=print)
    return usable_examples(config, source, Rejects(), decode=True, log=print)


def _sheet(
    cascade: Cascade, source: Source, images: list[np.ndarray], pairs: list[tuple[int, int]]
) -> np.ndarray:
    """Rows of: base sample, its bilinear upsampling, the cascade's sample, the real picture."""
    base, final = cascade.stages[0].stage, cascade.stages[-1].stage
    headers = [f"base {base.resolution} px", "bilinear", f"cascade {final.resolution} px", "real"]
    rows = []
    for i, j in pairs:
        small = images[0][i]
        wide = resizing.upsample(stages.to_model_range(small[None]), final.resolution // base.resolution)
        bilinear = np.asarray(stages.to_pixels(wide))[0]
        rows.append((source.captions[j], [small, bilinear, images[-1][i], _at(source, j, final.resolution)]))
    return sheet(headers, rows, side=max(final.resolution, 96), blocks=2)


def _at(source: Source, i: int, resolution: int) -> np.ndarray:
    """A picture of the source, brought to a resolution."""
    if source.resolution % resolution:
        raise UserError(f"pictures of {source.resolution} px cannot be shown at {resolution} px.")
    return downsample(source[i].image, source.resolution // resolution)


def _write_all(folder: Path, images: np.ndarray, captions: list[str], stage: str) -> None:
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        write_png(folder / f"{i:04d}.png", image, {"prompt": caption, "stage": stage})


def _identity(config: ConfigDict, cascade: Cascade) -> dict[str, object]:
    """What an evaluation depends on."""
    values = json.loads(config.to_json_best_effort())
    return {
        "steps": {item.name: item.step for item in cascade.stages},
        "seed": values["seed"],
        "evaluate": values["evaluate"],
        "samplers": {name: entry["sampler"] for name, entry in values["stages"].items()},
    }


def _known(workdir: Path, identity: dict[str, object]) -> dict[str, SplitResult] | None:
    """The results of an earlier evaluation of the same, if there are any."""
    try:
        kept = json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
        if kept["identity"] != identity:
            return None
        results = {
            split: SplitResult(Retrieval(*r["score"]), Retrieval(*r["control"]), str(r["sheet"]))
            for split, r in kept["results"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return results if all((workdir / r.sheet).is_file() for r in results.values()) else None


def _remember(workdir: Path, identity: dict[str, object], results: dict[str, SplitResult]) -> None:
    kept = {"identity": identity, "results": {split: r._asdict() for split, r in results.items()}}
    path = workdir / RESULTS
    try:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
