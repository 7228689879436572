"""What a run leaves to look at: `report.html`, and tables and plots of measures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from diffjax import preview, run_config
from diffjax.cascade import stage_workdir
from diffjax.errors import UserError
from diffjax.evaluation import report, tables
from diffjax.evaluation.errorbars import Value
from diffjax.evaluation.plots import Series, chart
from diffjax.evaluation.report import Comparison, StageRun
from diffjax.evaluation.tables import Result
from diffjax.untrusted import read_bytes

PAGE = "report.html"
_MAX_PREVIEWS = 12
_MAX_BYTES = 2**26

# What plots show, where it was measured: the first of these, by the beginning of its name.
_FIDELITY = ("FD", "FID", "KID", "retrieval top1")


def write_results(folder: Path, results: Sequence[Result], name: str = "results") -> None:
    """Write `NAME.csv`, `NAME.json`, and where several ways of sampling were tried the plots of them as SVG.

    Raises:
      UserError: they cannot be written.
    """
    write_text(folder / f"{name}.csv", tables.to_csv(results))
    write_text(folder / f"{name}.json", tables.to_json(results))
    for split in dict.fromkeys(result.split for result in results):
        for kind, drawing in plots(results, split, alone=True).items():
            write_text(folder / f"{name}-{split}-{kind}.svg", drawing)


def write_report(
    config: ConfigDict, workdir: Path, results: Sequence[Result] = (), comparisons: Sequence[Comparison] = ()
) -> Path:
    """Write the page about a cascade's run; returns its path.

    Raises:
      UserError: it cannot be written.
    """
    stages = [stage_run(name, stage_workdir(config, name, workdir)) for name in config.stages]
    charts: list[str] = []
    for split in dict.fromkeys(result.split for result in results):
        charts += plots(results, split).values()
    sentences = [f"{result.images:,} images of {result.split}." for result in results[:1]]
    text = report.build(
        workdir.resolve().name,
        results=results,
        charts=charts,
        comparisons=comparisons,
        stages=[stage for stage in stages if stage.metrics or stage.previews],
        config=run_config.to_json(config),
        notes=sentences,
    )
    write_text(workdir / PAGE, text)
    return workdir / PAGE


def plots(results: Sequence[Result], split: str, *, alone: bool = False) -> dict[str, str]:
    """Charts of one split: quality against evaluations of networks, and precision against recall.

    Restored pictures are left out, and all is where there are fewer than two ways of sampling.
    """
    shown = [result for result in results if result.split == split and result.nfe]
    names = tables.columns(shown)
    found: dict[str, str] = {}
    measure = next((name for start in _FIDELITY for name in names if name.startswith(start)), "")
    tried = [result for result in shown if result.settings]
    if tried and measure:
        configured = shown[0]
        series = [
            Series(configured.name, [_point(configured, measure)], [_error(configured, measure)], line=False)
        ]
        for key, group in _groups(tried).items():
            group = sorted(group, key=lambda result: (result.nfe, str(result.settings)))
            labels = [_label(result) for result in group]
            points = [_point(result, measure) for result in group]
            errors = [_error(result, measure) for result in group]
            series.append(Series(key, points, errors, labels, line="num_steps" in group[0].settings))
        found["nfe"] = chart(
            series, title=f"{split}: quality against work", x="evaluations of networks for one image",
            y=measure, log_x=True, alone=alone,
        )  # fmt: skip
    both = [result for result in shown if {"precision", "recall"} <= result.scores.keys()]
    if len(both) > 1:
        series = [
            Series("", [(r.scores["recall"].value, r.scores["precision"].value)], (), [r.name], line=False)
            for r in both
        ]
        found["pareto"] = chart(
            series, title=f"{split}: fidelity against diversity", x="recall", y="precision", alone=alone
        )
    return found


def stage_run(name: str, folder: Path) -> StageRun:
    """What a stage's working directory tells of its training; what is missing there is left out."""
    metrics, pictures, config = [], [], ""
    try:
        config = run_config.to_json(run_config.load(folder))
        for line in read_bytes(folder / "metrics.jsonl", _MAX_BYTES).decode("utf-8", "replace").splitlines():
            values = _line(line)
            if values:
                metrics.append(values)
    except UserError:
        pass
    paths = sorted(path for path in (folder / preview.FOLDER).glob("*.png") if path.stem.isdecimal())
    count = min(len(paths), _MAX_PREVIEWS)
    for path in [paths[(i + 1) * len(paths) // count - 1] for i in range(count)]:
        try:
            pictures.append((int(path.stem), read_bytes(path, _MAX_BYTES)))
        except UserError:
            continue
    return StageRun(name, metrics, pictures, config)


def _line(line: str) -> dict[str, float]:
    try:
        values = json.loads(line)
        return {"step": int(values["step"]), **values}
    except (ValueError, KeyError, TypeError):
        return {}  # half a line, of a process that was killed


def _groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By what is one line: the same settings but for the number of steps."""
    found: dict[str, list[Result]] = {}
    for result in results:
        rest = {key: value for key, value in result.settings.items() if key != "num_steps"}
        single = len(result.settings) == 1
        name = ", ".join(f"{key}={value}" for key, value in rest.items())
        if single:
            name = next(iter(result.settings)).replace("_", " ")
        found.setdefault(name, []).append(result)
    return found


def _label(result: Result) -> str:
    """The value that a point stands for, where one setting was changed."""
    return str(*result.settings.values()) if len(result.settings) == 1 else ""


def _point(result: Result, measure: str) -> tuple[float, float]:
    return float(result.nfe), result.scores.get(measure, Value(math.nan, math.nan)).value


def _error(result: Result, measure: str) -> float:
    return result.scores.get(measure, Value(math.nan, math.nan)).error


def write_text(path: Path, text: str) -> None:
    """Write a file, which appears whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
