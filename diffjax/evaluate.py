"""Mode `evaluate`: samples of a cascade beside real pictures, and measures of how good they are."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import workdir as workdirs
from diffjax.cascade import Cascade, open_cascade
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.evaluation import tables
from diffjax.evaluation.grids import write_png
from diffjax.evaluation.report import Comparison
from diffjax.evaluation.retrieval import Retrieval, nearest_pictures, retrieval, shuffled
from diffjax.evaluation.tables import Result
from diffjax.experiment import build_source, usable_examples
from diffjax.judges import Judges, Known, Suspects, judge_real, known_of, open_judges
from diffjax.measures import pictures
from diffjax.parallel import hosts
from diffjax.parallel.mesh import check_batch
from diffjax.report import write_report, write_results
from diffjax.samples import Asked, ask, fingerprint
from diffjax.score_folder import score_folder
from diffjax.scoring import (
    FOLDER,
    Task,
    chosen_images,
    compared_pictures,
    copied_pictures,
    sampled,
    score_restored,
    score_variant,
    write_sheet,
)
from diffjax.stage_scores import score_stages
from diffjax.sweep import Variant, up_to, variants

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


def evaluate(config: ConfigDict, workdir: Path, *, measure: bool = True) -> None:
    """Sample captions of each split, write a sheet of each, and print measures and caption retrieval.

    Retrieval looks for each base sample's nearest pictures (mean squared pixel distance at the base
    resolution) among the base stage's training pictures and those of the split. The last lines printed are
    the first split's score and its sheet. A repeated call on the same checkpoints prints what is known; one
    that follows a call that was stopped samples and measures only what is missing.

    Args:
      config: a cascade's configuration.
      workdir: receives `evaluation/`, the sheets and `report.html`.
      measure: compute all measures, of `num_images` samples, the sweep's and the baselines'; otherwise look
        at `num_prompts` samples only.

    Raises:
      UserError: a stage, a picture or a reference is missing, or settings do not fit together.
    """
    settings = {**config.evaluate, "held_out.num_images": config.evaluate.held_out.num_images}
    least_of = {"num_prompts": 1, "num_images": 2, "num_restored": 0, "sheet_rows": 1}
    for key, least in {**least_of, "held_out.num_images": 0}.items():
        if settings[key] < least:
            raise UserError(f"evaluate.{key}={settings[key]}; expected at least {least}.")
    with workdirs.hold(workdir, first=hosts.is_first()):
        if config.evaluate.folder:
            score_folder(config, workdir)
            return
        cascade = up_to(open_cascade(config, workdir), config.evaluate.stage)
        check_batch(config.batch_size, cascade.mesh)
        identity = _identity(config, cascade, measure)
        known = _known(workdir, identity)
        missing = hosts.anywhere(np.array(known is None))  # in one process, and all sample again
        if known is None or missing:
            judges = open_judges(config.evaluate, cascade.mesh, print) if measure else Judges()
            known = _evaluate_splits(config, cascade, workdir, measure, judges)
            # A network whose package is missing today may be there tomorrow.
            whole = not measure or not config.evaluate.features or judges.features is not None
            if whole and hosts.is_first():
                _remember(workdir, identity, *known)
    results, table = known
    if table:
        print(f"\n{table}\n\n{workdir / FOLDER / 'results.csv'}")
    print(workdir / "report.html")
    for split, result in reversed(results.items()):
        name = "retrieval" if split == config.evaluate.splits[0] else f"{split}: retrieval"
        score, control = result.score, result.control
        print(
            f"{name} top1 {score.top1:.1%} top5 {score.top5:.1%} "
            f"(control top1 {control.top1:.1%} top5 {control.top5:.1%})"
        )
        print(workdir / result.sheet, flush=True)


def _evaluate_splits(
    config: ConfigDict, cascade: Cascade, workdir: Path, measure: bool, judges: Judges
) -> tuple[dict[str, SplitResult], str]:
    """What came out for every split, and the table of measures as text."""
    settings = config.evaluate
    ways = variants(config, cascade, workdir) if measure else variants(config, cascade, workdir)[:1]
    final = cascade.stages[-1]
    train = _open(cascade)
    found, results, comparisons = {}, list[Result](), list[Comparison]()
    for split in settings.splits:
        source = train if split == cascade.stages[0].config.data.split else _open(cascade, split)
        known = Known()
        if measure:
            known = known_of(judges, settings, source, train, final.stage.resolution, final.config, print)
        gallery = _gallery(cascade, train, source)
        task = Task(config, workdir / FOLDER, split, source, train, gallery, judges, known, print)
        count = settings.num_images if measure else min(settings.num_prompts, len(source))
        asked = ask(source.captions, count)
        copied = None
        for way in ways if measure else ():
            print(f"{split}: {way.name}.", flush=True)
            scored, suspects = score_variant(task, way, asked)
            results += scored
            if way is ways[0]:
                copied = _copies(task, way, asked, suspects, workdir)
        found[split], comparison = _look(task, ways[0], asked, workdir)
        comparisons.append(comparison)
        if measure:
            restored, shown = score_restored(task, cascade, ways[0].samplers, asked)
            comparisons += [part for part in (copied, shown) if part]
            results += [*restored, *_real(task, cascade), *score_stages(task, cascade)]
    if hosts.is_first():
        if results:
            write_results(workdir / FOLDER, results)
        write_report(config, workdir, results, comparisons)
    return found, tables.to_text(results) if results else ""


def _real(task: Task, cascade: Cascade) -> list[Result]:
    """What measures say of the split's own pictures, beside which those of samples are to be seen."""
    captions = task.source.captions if cascade.encoder is not None else ()
    scores = judge_real(task.judges, task.known, captions, seed=task.config.seed)
    return [Result(task.split, "real pictures", {}, len(task.source), 0, scores)] if scores else []


def _copies(task: Task, way: Variant, asked: Asked, suspects: Suspects, workdir: Path) -> Comparison | None:
    """The samples that look most like copies of training pictures; writes the sheet of them."""
    if not suspects:
        return None
    _, parts = sampled(task, way.cascade, way.samplers, asked)
    images = chosen_images(parts, [i for i, _, _ in suspects])
    comparison = copied_pictures(task.split, task.train, suspects, images, asked.captions)
    write_sheet(workdir / f"memorisation-{task.split}.png", comparison, split=task.split)
    return comparison


def _look(task: Task, way: Variant, asked: Asked, workdir: Path) -> tuple[SplitResult, Comparison]:
    """Caption retrieval and its control; writes the sheet and every sample as a PNG file."""
    split, seed, last = task.split, task.config.seed, way.cascade.stages[-1].name
    gallery, shown = task.gallery
    concepts = [task.source.concepts[i] for i in asked.places]
    places, start = [], 0
    for images in sampled(task, way.cascade, way.samplers, asked)[1]:
        places.append(nearest_pictures(images[0], gallery))
        for image in images[-1] if hosts.is_first() else ():
            path = workdir / f"samples-{split}" / f"{start:04d}.png"
            write_png(path, image, {"prompt": asked.captions[start], "stage": last})
            start += 1
    nearest = np.concatenate(places)
    score = retrieval(nearest, shown, concepts)
    control = retrieval(nearest, shown, shuffled(concepts, seed))
    comparison = compared_pictures(task, way, asked)
    name = f"sheet-{split}.png"
    write_sheet(workdir / name, comparison, seed=str(seed), split=split)
    return SplitResult(score, control, name), comparison


def _open(cascade: Cascade, split: str | None = None) -> Source:
    """The pictures of a split that can be used; all are decoded for retrieval anyway."""
    config = cascade.stages[0].config
    source = build_source(config.data, split=split, log=print)
    return usable_examples(config, source, Rejects(), decode=True, log=print)


def _gallery(cascade: Cascade, train: Source, source: Source) -> tuple[np.ndarray, list[str]]:
    """The pictures that samples are compared with for retrieval, and what each shows."""
    sources = (train,) if source is train else (train, source)
    resolution = cascade.stages[0].stage.resolution
    gallery = np.concatenate([part for origin in sources for part in pictures(origin, resolution)])
    return gallery, [concept for origin in sources for concept in origin.concepts]


def _identity(config: ConfigDict, cascade: Cascade, measure: bool) -> dict[str, object]:
    """What an evaluation depends on."""
    values = json.loads(config.to_json_best_effort())
    return {
        "steps": {item.name: item.step for item in cascade.stages},
        "parameters": {item.name: fingerprint(item.params) for item in cascade.stages},
        "seed": values["seed"],
        "measure": measure,
        "evaluate": values["evaluate"],
        "samplers": {name: entry["sampler"] for name, entry in values["stages"].items()},
    }


def _known(workdir: Path, identity: dict[str, object]) -> tuple[dict[str, SplitResult], str] | None:
    """The results of an earlier evaluation of the same, if there are any."""
    try:
        kept = json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
        if kept["identity"] != identity:
            return None
        results = {
            split: SplitResult(Retrieval(*r["score"]), Retrieval(*r["control"]), str(r["sheet"]))
            for split, r in kept["results"].items()
        }
        table = str(kept["table"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = [workdir / r.sheet for r in results.values()] + [workdir / "report.html"]
    return (results, table) if all(path.is_file() for path in there) else None


def _remember(
    workdir: Path, identity: dict[str, object], results: dict[str, SplitResult], table: str
) -> None:
    kept = {
        "identity": identity,
        "results": {split: r._asdict() for split, r in results.items()},
        "table": table,
    }
    path = workdir / RESULTS
    try:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
