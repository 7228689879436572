import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from diffjax.evaluation.plots import Series, chart, short

NS = "{http://www.w3.org/2000/svg}"


def circles(svg):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).iter(f"{NS}circle")]


def test_points_lie_where_their_values_say():
    svg = chart([Series("", [(0, 0), (1, 5), (2, 10)], line=False)])
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x2 > x0
    assert y2 < y0  # larger values are higher
    places = [x for x, _ in circles(chart([Series("", [(1, 1), (10, 1), (100, 1)], line=False)], log_x=True))]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)


def test_ticks_stand_at_their_values():
    svg = ET.fromstring(chart([Series("", [(0, 0), (10, 1)], line=False)]))
    (x0, _), (x1, _) = circles(ET.tostring(svg))
    texts = {t.text: float(t.get("x")) for t in svg.iter(f"{NS}text") if t.get("text-anchor") == "middle"}
    assert texts["0"] == pytest.approx(x0, abs=0.2)
    assert texts["10"] == pytest.approx(x1, abs=0.2)
    assert [short(v) for v in (0, 0.05, 12, 3500, 2e6, 1e-6)] == ["0", "0.05", "12", "3.5k", "2M", "1e-06"]


def test_an_error_bar_reaches_one_error_up_and_down():
    svg = chart([Series("", [(0, 0), (1, 4)], errors=(math.nan, 4.0), line=False)])
    (_, y0), (_, y1) = circles(svg)
    low, high = (float(y) for y in re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)[0])
    assert low == pytest.approx(y0, abs=0.2)
    assert y1 - high == pytest.approx(low - y1, abs=0.2)


def test_labels_do_not_lie_on_each_other():
    near = [Series("", [(1.0, 1.0 + 0.01 * i), (9.0, 5.0)], labels=[f"one{i}", f"two{i}"]) for i in range(4)]
    texts = {t.text: float(t.get("y")) for t in ET.fromstring(chart(near)).iter(f"{NS}text")}
    for name in ("one", "two"):
        heights = sorted(texts[f"{name}{i}"] for i in range(4))
        assert min(b - a for a, b in itertools.pairwise(heights)) >= 10.0
    alone = chart([Series("", [(1.0, 1.0), (9.0, 5.0)], labels=["one", "two"])])
    (_, y), _ = circles(alone)
    assert f'y="{y + 4:.1f}" text-anchor="start" fill="var(--ink)">one' in alone


def test_what_cannot_be_drawn_is_left_out_and_texts_are_texts():
    svg = chart(
        [Series("<b>&", [(0, 1), (1, math.nan), (2, math.inf), (3, 2)], labels=["<i>"] * 4)],
        title='"><script>alert(1)</script>',
        log_x=True,
        alone=True,
    )
    root = ET.fromstring(svg)  # well-formed
    assert len([c for c in circles(svg) if c[0] < 400]) == 1
    assert {element.tag for element in root.iter()} <= {
        NS + n for n in ("svg", "style", "text", "path", "circle")
    }
    assert chart([])  # nothing to draw is no error
    assert chart([Series("x", [(1, 1)])], log_y=True)
