"""Line charts and scatter plots as SVG, small enough to stand inside a page; nothing but text is needed."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

# Of series, in this order; the second of a pair is for dark pages.
COLOURS = (
    ("#3b6fd4", "#7aa5ff"),
    ("#d9632b", "#ff9d66"),
    ("#2a8f5b", "#5fd39a"),
    ("#8a4fc0", "#c79bf2"),
    ("#b8860b", "#e8c14d"),
    ("#c43d63", "#ff86a6"),
    ("#3a8fa3", "#6fd0e3"),
    ("#6b7280", "#a5adba"),
)
_LIGHT = ":root{--ink:#1f2430;--soft:#6b7280;--grid:#e4e7ee;" + "".join(
    f"--s{i}:{light};" for i, (light, _) in enumerate(COLOURS)
)
_DARK = ":root{--ink:#e8eaf0;--soft:#9aa3b2;--grid:#2c3140;" + "".join(
    f"--s{i}:{dark};" for i, (_, dark) in enumerate(COLOURS)
)
STYLE = f"{_LIGHT}}} @media(prefers-color-scheme:dark){{{_DARK}}}}}"
"""The variables that charts are drawn with, for light and for dark pages."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 44
_LETTER, _LINE = 6.4, 11.0  # how wide a letter is taken to be, and how high a line


class Series(NamedTuple):
    """One line, or one cloud of points.

    Attributes:
      name: as the legend shows it; "" for none.
      points: pairs (x, y); those that are not finite are left out.
      errors: of y, as many, or none.
      labels: of the points, shown beside them, as many, or none.
      line: whether the points are joined.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    labels: Sequence[str] = ()
    line: bool = True


def chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (560, 320),
    alone: bool = False,
) -> str:
    """A chart as an SVG element.

    Args:
      series: what is drawn; more than there are colours begin again with the first.
      title: above it.
      x: under the axis.
      y: above the axis, under the title.
      log_x: whether the axis is logarithmic; values that are not positive are then left out.
      log_y: the same of the other axis.
      size: width and height in its own units; a page scales it.
      alone: whether it is to be a file of its own, with the colours in it.
    """
    width, height = size
    names = [part.name for part in series]
    edge = width - (_RIGHT if not any(names) else 24 + _LETTER * max(map(len, names)))  # of the axes
    series = [_finite(part, log_x=log_x, log_y=log_y) for part in series]
    xs = [point[0] for part in series for point in part.points]
    ys = [value for part in series for value in _reach(part, log_y=log_y)]
    at_x, ticks_x = _axis(xs, _LEFT, edge, log=log_x)
    at_y, ticks_y = _axis(ys, height - _BOTTOM, _TOP + 14, log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="chart" role="img" '
        f'aria-label="{escape(title or y)}" font-family="system-ui,sans-serif" font-size="11">'
    ]
    if alone:
        parts.append(f"<style>{STYLE} svg{{background:#fff}} @media(prefers-color-scheme:dark)"
                     "{svg{background:#14171f}}</style>")  # fmt: skip
    parts.append(_text(_LEFT, 15, title, "ink", size=13, weight=600))
    parts.append(_text(_LEFT, 30, y, "soft"))
    parts.append(_text((_LEFT + edge) / 2, height - 8, x, "soft", anchor="middle"))
    for value, name in ticks_y:
        place = at_y(value)
        parts.append(f'<path d="M{_LEFT} {place:.1f}H{edge:.1f}" stroke="var(--grid)"/>')
        parts.append(_text(_LEFT - 8, place + 4, name, "soft", anchor="end"))
    for value, name in ticks_x:
        place, foot = at_x(value), height - _BOTTOM
        parts.append(f'<path d="M{place:.1f} {foot}v4" stroke="var(--soft)"/>')
        parts.append(_text(place, foot + 17, name, "soft", anchor="middle"))
    taken: list[tuple[float, float, float]] = []
    for i, part in enumerate(series):
        parts += _draw(part, f"var(--s{i % len(COLOURS)})", at_x, at_y, right=edge, taken=taken)
    parts += _legend(names, edge + 14)
    return "".join(parts) + "</svg>"


def _draw(
    part: Series,
    colour: str,
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    *,
    right: float,
    taken: list[tuple[float, float, float]],
) -> list[str]:
    """A series; `taken` has the left and right ends and the heights of the labels that are there."""
    found = []
    places = [(at_x(a), at_y(b)) for a, b in part.points]
    if part.line and len(places) > 1:
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        found.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>'
        )
    for (_, value), error, (a, _) in zip(part.points, part.errors, places, strict=False):
        if math.isfinite(error):
            low, high = at_y(value - error), at_y(value + error)
            found.append(f'<path d="M{a:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-opacity=".55"/>')
    if not part.line or len(places) <= 12:
        found += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{3 if part.line else 4.5}" fill="{colour}"/>'
            for a, b in places
        ]
    for (a, b), label in zip(places, part.labels, strict=False):
        left = a > 0.7 * right
        wide = _LETTER * len(label)
        begin = a - 8 - wide if left else a + 8
        while any(begin < end and start < begin + wide and abs(b - y) < _LINE for start, end, y in taken):
            b += 1.0  # below what is there
        taken.append((begin, begin + wide, b))
        found.append(_text(a + (-8 if left else 8), b + 4, label, "ink", anchor="end" if left else "start"))
    return found


def _legend(names: Sequence[str], left: float) -> list[str]:
    found = []
    for i, name in enumerate(names):
        if name:
            place = _TOP + 22 + 18 * i
            found.append(
                f'<circle cx="{left:.1f}" cy="{place - 4}" r="4" fill="var(--s{i % len(COLOURS)})"/>'
            )
            found.append(_text(left + 9, place, name, "ink"))
    return found


def _text(
    x: float, y: float, text: str, colour: str, *, anchor: str = "start", size: int = 0, weight: int = 0
) -> str:
    if not text:
        return ""
    style = (f' font-size="{size}"' if size else "") + (f' font-weight="{weight}"' if weight else "")
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="var(--{colour})"{style}>{escape(text)}</text>'


def _finite(part: Series, *, log_x: bool, log_y: bool) -> Series:
    errors = part.errors or [math.nan] * len(part.points)
    labels = part.labels or [""] * len(part.points)
    kept = [
        row
        for row in zip(part.points, errors, labels, strict=True)
        if all(
            math.isfinite(v) and (v > 0.0 or not log) for v, log in zip(row[0], (log_x, log_y), strict=True)
        )
    ]
    points, errors, labels = zip(*kept, strict=True) if kept else ((), (), ())
    return part._replace(points=points, errors=errors, labels=labels)


def _reach(part: Series, *, log_y: bool) -> list[float]:
    """The values of y that must be within the chart: those of points, and the ends of their error bars."""
    found = [b for _, b in part.points]
    for (_, b), error in zip(part.points, part.errors, strict=False):
        found += [v for v in (b - error, b + error) if math.isfinite(v) and (v > 0.0 or not log_y)]
    return found


def _axis(
    values: Sequence[float], start: float, end: float, *, log: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From values to places between `start` and `end`, and the ticks: values with their names."""
    forward = math.log10 if log else float
    shown = [forward(value) for value in values] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        raw = forward(value) if not log or value > 0.0 else low
        return start + (end - start) * min(max((raw - low) / (high - low), 0.0), 1.0)

    if log:
        steps = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        ticks = [value for value in steps if low <= math.log10(value) <= high]
        thin = len(ticks) > 8
        ticks = [value for value in ticks if not thin or math.log10(value) % 1.0 < 1e-9]
    else:
        rough = (high - low) / 5.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(low / step)
        ticks = [i * step for i in range(first, math.floor(high / step) + 1)]
    return place, [(value, short(value)) for value in ticks]


def short(value: float) -> str:
    """A number for an axis: 0.05, 12, 3.5k, 2M, 1e-6."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value and abs(value) >= 1e-4 else f"{value:.0e}" if value else "0"
