"""The report's page, also as a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffjax.evaluation import page, report
from diffjax.evaluation.errorbars import Value
from diffjax.evaluation.report import Comparison, StageRun, build
from diffjax.evaluation.tables import Result

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
RED, GREEN = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 160, 0)))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def example():
    """A page in which every text is hostile, with red pictures on the left and green ones on the right."""
    metrics = [
        {"step": i, "loss": 1.0 / i, "loss_by_logsnr/-2_to_0": 0.5, HOSTILE: 1.0} for i in range(1, 60)
    ]
    preview = report.data_uri(RED)
    assert preview.startswith("data:image/png;base64,")
    return build(
        f"A run {HOSTILE}",
        results=[
            Result(HOSTILE, HOSTILE, {}, 500, 50, {HOSTILE: Value(1.5, 0.25), "recall": Value(0.5, 0.1)})
        ],
        comparisons=[
            Comparison("Samples", HOSTILE, ["low-res", "real"], [(HOSTILE, [RED, GREEN])] * 3, 0, 1)
        ],
        stages=[StageRun(HOSTILE, metrics, [(7, png(RED)), (9, png(GREEN))], HOSTILE)],
        config=HOSTILE,
        notes=[HOSTILE],
    )


def png(image):
    import base64

    return base64.b64decode(report.data_uri(image).partition(",")[2])


class Elements(HTMLParser):
    """Which elements a page has, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_texts_stay_texts_and_nothing_is_fetched():
    text = example()
    elements = Elements(text).found
    assert [tag for tag, _ in elements].count("script") == 2  # the data and the page's own
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not {"src", "href", "srcset"} & attributes.keys()
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    inner = text.partition('id="data">')[2].partition("</script>")[0]
    data = json.loads(inner)
    assert data["comparisons"][0]["items"][0]["caption"] == HOSTILE


def test_the_same_run_gives_the_same_page_and_what_is_empty_is_left_out():
    assert example() == example()
    bare = build("nothing")
    assert "<section" not in bare
    assert "<table" not in bare


def browse(tmp_path, *options):
    (tmp_path / "report.html").write_text(example(), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--window-size=1000,1400",
        "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path}/profile",
    ]
    command += [*options, (tmp_path / "report.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_the_pictures_side_by_side(tmp_path):
    shown = browse(tmp_path, "--dump-dom")
    assert 'data-ready="yes"' in shown  # the script ran to its end
    assert "<title>A run &lt;/script&gt;" in shown  # and nobody else's
    assert shown.count("<button") == 3
    assert "step 9" in shown
    browse(tmp_path, f"--screenshot={tmp_path}/page.png")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    places = {
        name: np.argwhere((np.abs(picture - colour) < 8).all(axis=-1))
        for name, colour in (("red", (255, 0, 0)), ("green", (0, 160, 0)))
    }
    assert min(map(len, places.values())) > 20_000  # both halves of the picture, enlarged
    tall = {
        row
        for row, count in zip(*np.unique(places["red"][:, 0], return_counts=True), strict=True)
        if count > 150
    }
    row = sorted(tall)[len(tall) // 2]
    red, green = (places[name][places[name][:, 0] == row][:, 1] for name in ("red", "green"))
    assert red.max() < green[green > red.min()].min()  # the left one is on the left


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_it_dark_where_that_is_asked_for(tmp_path):
    means = []
    for options in ((), ("--blink-settings=preferredColorScheme=0",)):
        browse(tmp_path, *options, f"--screenshot={tmp_path}/page.png")
        means.append(np.asarray(Image.open(tmp_path / "page.png").convert("L"))[:60].mean())
    assert means[0] > 200.0
    assert means[1] < 60.0


def test_the_script_uses_no_way_to_turn_text_into_elements():
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", page.SCRIPT
    )
