import sys
import time

import pytest

from diffjax.training import progress as module
from diffjax.training.progress import TrainingProgress, duration


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_a_report_is_one_plain_line_where_there_is_no_terminal(capsys, clock):
    with TrainingProgress("base", start=100, steps=200, batch_size=8) as progress:
        progress.advance(105)
        clock.now = 4.0
        speed = progress.report(110, {"loss": 0.12345}, waited=1.0)
    assert speed == pytest.approx({"images_per_second": 20.0, "data_wait": 0.25})
    shown = "base: step 110/200, 20 images/s, 36 s left, loss 0.1235, data wait 25%\n"
    assert capsys.readouterr().out == shown


def test_the_rate_is_of_the_time_since_the_last_report(capsys, clock):
    progress = TrainingProgress("base", start=0, steps=100, batch_size=8)
    clock.now = 10.0
    progress.report(10, {"loss": 1.0})
    clock.now = 12.0
    assert progress.report(20, {"loss": 1.0})["images_per_second"] == pytest.approx(40.0)
    clock.now = 75.0
    assert progress.elapsed() == "1 min 15 s"
    progress.say("done")
    assert capsys.readouterr().out.endswith("done\n")


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with TrainingProgress("base", start=0, steps=4, batch_size=8) as progress:
        for step in range(1, 5):
            progress.advance(step)
        time.sleep(0.01)
        progress.report(4, {"loss": 0.5})
        progress.say("saved in [runs]/x")
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "loss 0.5" in out
    assert "saved in [runs]/x" in out
