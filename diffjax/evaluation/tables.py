"""Results as a table on the terminal, as CSV and as JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffjax.evaluation.errorbars import Value


class Result(NamedTuple):
    """What was measured of one set of images.

    Attributes:
      split: of which captions, or which pictures it is compared with.
      name: which images.
      settings: how they were sampled, where that differs from the configuration.
      images: how many.
      nfe: evaluations of networks for one image; 0 where that is not known.
      scores: the measures.
    """

    split: str
    name: str
    settings: dict[str, Any]
    images: int
    nfe: int
    scores: Mapping[str, Value]


def columns(results: Sequence[Result]) -> list[str]:
    """All measures that any of the results has, in the order of their first appearance."""
    return list(dict.fromkeys(key for result in results for key in result.scores))


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """The results that belong into one table: those of which the same was measured first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(next(iter(result.scores), ""), []).append(result)
    return list(found.values())


def shown(value: Value | None) -> str:
    """A value and its error, rounded to what the error leaves certain: "12.3 ± 0.4"."""
    if value is None or math.isnan(value.value):
        return "–"
    if not math.isfinite(value.value):
        return "∞"
    if not math.isfinite(value.error) or value.error == 0.0:
        return f"{value.value:.4g}"
    digits = min(max(1 - math.floor(math.log10(value.error)), 0), 6)
    return f"{value.value:.{digits}f} ± {value.error:.{digits}f}"


def to_rows(results: Sequence[Result]) -> list[list[str]]:
    """A row of names, then one for each result."""
    names = columns(results)
    rows = [["split", "images of", "images", "NFE", *names]]
    for result in results:
        scores = [shown(result.scores.get(name)) for name in names]
        rows.append([result.split, result.name, f"{result.images:,}", str(result.nfe or "–"), *scores])
    return rows


def to_text(results: Sequence[Result], width: int = 110) -> str:
    """Aligned columns for a terminal, a table a group; columns that do not fit follow in further tables."""
    return "\n\n".join(part for group in groups(results) for part in _tables(to_rows(group), width))


def _tables(rows: list[list[str]], width: int) -> list[str]:
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    left = sum(widths[:2])  # split and name stand in every table
    blocks: list[list[int]] = [[]]
    for j in range(2, len(widths)):
        if blocks[-1] and left + sum(widths[k] for k in blocks[-1]) + widths[j] > width:
            blocks.append([])
        blocks[-1].append(j)

    def line(row: list[str], block: list[int]) -> str:
        names = "".join(row[j].ljust(widths[j]) for j in range(2))
        return (names + "".join(row[j].rjust(widths[j]) for j in block)).rstrip()

    return ["\n".join(line(row, block) for row in rows) for block in blocks]


def to_csv(results: Sequence[Result]) -> str:
    """One line for each result; every measure has a column, and one for its error. Unknown is empty."""
    names = columns(results)
    settings = list(dict.fromkeys(key for result in results for key in result.settings))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measures = [part for name in names for part in (name, f"{name} error")]
    writer.writerow(["split", "name", *settings, "images", "nfe", *measures])
    for result in results:
        values = [
            "" if part is None or math.isnan(part) else repr(float(part))
            for name in names
            for part in result.scores.get(name, (None, None))
        ]
        own = [result.settings.get(key, "") for key in settings]
        writer.writerow([result.split, result.name, *own, result.images, result.nfe or "", *values])
    return file.getvalue()


def to_json(results: Sequence[Result], **about: Any) -> str:
    """The results, and what else is told about all of them; unknown numbers are null."""

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    rows = [
        {
            **result._asdict(),
            "scores": {
                key: {"value": number(value), "error": number(error)}
                for key, (value, error) in result.scores.items()
            },
        }
        for result in results
    ]
    return json.dumps({**about, "results": rows}, indent=2) + "\n"
