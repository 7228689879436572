"""A page about a run that stands alone: measures, pictures beside each other, curves, configuration."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffjax.evaluation import page, tables
from diffjax.evaluation.plots import Series, chart
from diffjax.evaluation.tables import Result


class Comparison(NamedTuple):
    """Pictures of the same thing, to be laid over each other.

    Attributes:
      title: what they are.
      about: a sentence more.
      names: of the kinds of pictures, such as "cascade" and "real".
      items: (caption, pictures), one picture of each kind, uint8 `[side, side, 3]`.
      left: the kind that is shown first on the left; `right` on the right.
    """

    title: str
    about: str
    names: Sequence[str]
    items: Sequence[tuple[str, Sequence[np.ndarray]]]
    left: int
    right: int


class StageRun(NamedTuple):
    """How a stage was trained.

    Attributes:
      name: of the stage.
      metrics: the lines of its metrics, each with `step`.
      previews: (step, bytes of a PNG), rising.
      config: its configuration as text.
    """

    name: str
    metrics: Sequence[Mapping[str, float]]
    previews: Sequence[tuple[int, bytes]]
    config: str


def build(
    title: str,
    *,
    results: Sequence[Result] = (),
    charts: Sequence[str] = (),
    comparisons: Sequence[Comparison] = (),
    stages: Sequence[StageRun] = (),
    config: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The page as HTML. All texts are taken as texts, whatever they contain; what is empty is left out.

    Args:
      title: of the page.
      results: what was measured; the first is shown largest.
      charts: SVG elements, from `diffjax.evaluation.plots`.
      comparisons: pictures beside each other.
      stages: how the stages were trained.
      config: the configuration as text.
      notes: sentences under the title.
    """
    parts = [f"<header><h1>{escape(title)}</h1>"]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in notes]
    parts.append("</header><main>")
    if results:
        parts += [_cards(results[0]), _table(results, charts)]
    parts += [_comparison(part, i) for i, part in enumerate(comparisons)]
    parts += [_stage(part, i) for i, part in enumerate(stages)]
    if config:
        parts.append(f"<section>{_details('Configuration', config)}</section>")
    parts.append("</main><footer>Made by diffjax. Everything is in this file.</footer>")
    return page.page(title, "".join(parts), json.dumps(_data(comparisons, stages)))


def data_uri(image: np.ndarray | bytes) -> str:
    """A picture, uint8 `[height, width, 3]` or the bytes of a PNG, as an address that holds it."""
    if not isinstance(image, bytes):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG", optimize=True)
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _data(comparisons: Sequence[Comparison], stages: Sequence[StageRun]) -> dict[str, Any]:
    """What the script shows."""
    return {
        "comparisons": [
            {
                "names": list(part.names),
                "left": part.left,
                "right": part.right,
                "items": [
                    {"caption": caption, "images": [data_uri(image) for image in images]}
                    for caption, images in part.items
                ],
            }
            for part in comparisons
        ],
        "previews": [
            [{"step": step, "image": data_uri(image)} for step, image in part.previews] for part in stages
        ],
    }


def _cards(result: Result) -> str:
    cards = []
    for name, value in list(result.scores.items())[:8]:
        number, _, error = tables.shown(value).partition(" ± ")
        error = f"± {error}" if error else "&nbsp;"
        cards.append(
            f'<div class="card"><span>{escape(name)}</span><b>{number}</b><small>{error}</small></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _table(results: Sequence[Result], charts: Sequence[str]) -> str:
    tabled = "".join(_rows(tables.to_rows(group)) for group in tables.groups(results))
    drawn = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    about = "With standard errors where they are known. NFE: evaluations of networks for one image."
    return f'<section><h2>Measures</h2><p class="soft">{about}</p>{tabled}{drawn}</section>'


def _rows(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _comparison(part: Comparison, i: int) -> str:
    return (
        f'<section><h2>{escape(part.title)}</h2><p class="soft">{escape(part.about)}</p>'
        f'<div class="compare" data-set="{i}"><div><div class="stack">'
        '<img alt="right"><img class="over" alt="left">'
        '<i></i><span class="r"></span><span class="l"></span></div>'
        '<input type="range" class="cut" min="0" max="100" value="50" '
        'aria-label="where the pictures meet"></div>'
        '<div><div class="caption"></div><div class="pick"><label>left <select class="left"></select></label>'
        '<label>right <select class="right"></select></label></div>'
        '<div class="thumbs"></div></div></div></section>'
    )


def _stage(part: StageRun, i: int) -> str:
    body = [f"<section><h2>Training of {escape(part.name)}</h2>"]
    if part.metrics:
        body.append(f'<div class="charts">{"".join(_curves(part.metrics))}</div>')
    if part.previews:
        body.append(
            f'<div class="over-time" data-set="{i}"><h3>Samples over time, <output></output></h3>'
            '<img alt="samples">'
            '<input type="range" min="0" value="0" aria-label="step"></div>'
        )
    if part.config:
        body.append(_details("Configuration", part.config))
    return "".join(body) + "</section>"


def _curves(metrics: Sequence[Mapping[str, float]], most: int = 400) -> list[str]:
    """Charts of what a run logged; of the losses by noise level one, of all else one each."""
    every = max(1, math.ceil(len(metrics) / most))
    names = sorted({name for line in metrics for name in line if name != "step"})
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    first = [
        name for name in ("loss", "loss_by_logsnr", "eval", "grad_norm", "learning_rate") if name in groups
    ]
    drawn = []
    for group in [*first, *(name for name in groups if name not in first)]:
        series = []
        for name in sorted(groups[group], key=_level):
            points = [(line["step"], line[name]) for line in metrics if _number(line.get(name))]
            label = name.partition("/")[2].replace("_to_", " to ") if len(groups[group]) > 1 else ""
            series.append(Series(label, [points[j] for j in range(0, len(points), every)]))
        positive = all(y > 0.0 for part in series for _, y in part.points)
        if any(part.points for part in series):
            title = group.replace("_", " ")
            drawn.append(
                chart(series, title=title, x="step", log_y=positive and group.startswith(("loss", "grad")))
            )
    return drawn


def _level(name: str) -> tuple[float, str]:
    """Names such as `loss_by_logsnr/-4_to_-2` in the order of their numbers."""
    found = re.search(r"/(-?\d+)", name)
    return (float(found[1]) if found else 0.0, name)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
