"""Runs whose numbers go wrong: updates are skipped, the run goes back, and in the end stops with a report."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import program
import pytest

from diffjax import recovery
from diffjax.errors import UserError
from diffjax.feed import Feed, Taken
from diffjax.train import train
from diffjax.training.checkpoint import FOLDER
from diffjax.training.diagnosis import Diagnosis
from diffjax.training.watch import Trouble

BATCH = 8
STEPS = 16


@pytest.fixture
def config(cache_dir):
    config = program.tiny_stage(cache_dir, STEPS)
    config.checkpoint.every = 4
    config.recovery.max_skips, config.recovery.max_rollbacks = 3, 2
    return config


@pytest.fixture
def poison(monkeypatch):
    """Makes the texts of some batches NaN, whenever they are met: of those with these numbers in the data."""
    take = Feed.take

    def put(*numbers):
        def poisoned(self, step, number):
            batch = take(self, step, number)
            if self.taken(number).before["next_index"] // BATCH + 1 in numbers:
                batch["text"] = batch["text"] * jax.numpy.nan
            return batch

        monkeypatch.setattr(Feed, "take", poisoned)

    return put


def final(workdir, step=STEPS):
    import orbax.checkpoint as ocp

    folder = workdir / FOLDER / str(step)
    trees = [ocp.StandardCheckpointer().restore(folder / item) for item in ("params", "ema_params", "rest")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def assert_equal_runs(one, other, step=STEPS):
    for a, b in zip(final(one, step), final(other, step), strict=True):
        np.testing.assert_array_equal(a, b)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_bad_batches_are_skipped_and_counted(config, poison, tmp_path):
    poison(3, 4, 7)
    train(config, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in final(tmp_path))
    assert recovery.rollbacks(tmp_path) == []
    lines = metrics(tmp_path)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[-1]["skipped"] == 3
    # A line holds what was known when its step had begun: the metrics of the one before.
    assert [line["step"] for line in lines if "loss" not in line] == [4, 5, 8]


@pytest.mark.slow
def test_a_run_that_goes_back_leaves_out_the_data_of_the_trouble(config, poison, tmp_path, capsys):
    poison(10, 11, 12, 13)
    train(config, tmp_path / "run")
    (entry,) = recovery.rollbacks(tmp_path / "run")
    assert (entry["step"], entry["restored"], entry["position"]["next_index"]) == (10, 8, 12 * BATCH)
    assert "Gone back to the checkpoint of step 8" in capsys.readouterr().out
    # What comes after step 8: number 13, bad as well and skipped, 14, ...: as if the others were not there.
    assert metrics(tmp_path / "run")[-1]["skipped"] == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == sorted(
        {line["step"] for line in metrics(tmp_path / "run")}
    )

    # The same, by a program that is interrupted after it has gone back.
    config.steps = 8
    train(config, tmp_path / "again")
    (tmp_path / "again" / recovery.FILE).write_text(json.dumps(entry) + '\n{"step": 10, "rest')
    config.steps = STEPS
    train(config, tmp_path / "again")
    assert_equal_runs(tmp_path / "run", tmp_path / "again")
    assert len(recovery.rollbacks(tmp_path / "again")) == 1  # it did not meet the trouble once more


@pytest.mark.slow
def test_what_was_saved_during_the_trouble_is_left_behind(config, poison, tmp_path):
    config.checkpoint.every = 2
    config.recovery.max_skips = 5
    poison(6, 7, 8, 9, 10)
    train(config, tmp_path)
    (entry,) = recovery.rollbacks(tmp_path)
    assert (entry["step"], entry["restored"]) == (6, 4)
    assert sorted(path.name for path in (tmp_path / FOLDER).glob("left-*")) == ["left-6", "left-8"]


def test_a_run_that_has_gone_back_too_often_stops_with_a_report(config, poison, tmp_path):
    poison(*range(6, 1000))
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    assert "after having gone back 2 times" in text
    assert "the batch's text" in text
    assert "the checkpoint of step 4 is good" in text
    report = json.loads((tmp_path / "trouble-5.json").read_text())
    assert report["first not finite"] == "the batch's text"
    assert len(report["examples of the batch"]) == BATCH
    assert report["examples of the batch"][0] in text
    assert [entry["restored"] for entry in recovery.rollbacks(tmp_path)] == [4, 4]


def test_the_report_names_the_examples_whose_loss_is_not_finite(tmp_path):
    source = SimpleNamespace(keys=[f"k{i}" for i in range(9)], captions=[f"caption {i}" for i in range(9)])
    taken = Taken(7, np.array([8, 2, 5, 0]), {}, {})
    trouble = Trouble(7, 9, "three updates had no numbers", finite=False)
    found = Diagnosis("the output of blocks (Block)", [1, 3])
    text = recovery.report(trouble, taken, found, source, workdir=tmp_path, times=0, good=4)
    assert (
        "update 7 on three updates had no numbers. The first that is not finite: the output of blocks" in text
    )
    assert "Examples of that update: k2, k0." in text
    written = json.loads((tmp_path / "trouble-7.json").read_text())
    assert written["examples without a finite loss"] == ["k2", "k0"]
    assert written["examples of the batch"] == ["k8", "k2", "k5", "k0"]
    assert written["captions"][1] == "caption 2"
    assert written["their places in the data"] == [8, 2, 5, 0]


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(config, poison, tmp_path):
    poison(1, 2, 3)
    with pytest.raises(UserError, match="there is no checkpoint of before"):
        train(config, tmp_path)
    assert not (tmp_path / recovery.FILE).exists()


@pytest.mark.slow
def test_a_loss_that_stays_high_takes_the_run_back(config, monkeypatch, tmp_path):
    from diffjax.training import watch

    monkeypatch.setattr(watch, "_ENOUGH", 4)
    config.recovery.spike_steps = 2
    see = watch.LossWatch.see

    def risen(self, step, loss, skipped):
        return see(self, step, loss * (1e6 if step in (9, 10) and not seen.get(step) else 1.0), skipped)

    seen = {}

    def once(self, step, loss, skipped):
        trouble = risen(self, step, loss, skipped)
        seen[step] = True
        return trouble

    monkeypatch.setattr(watch.LossWatch, "see", once)
    train(config, tmp_path)
    (entry,) = recovery.rollbacks(tmp_path)
    assert (entry["step"], entry["restored"], entry["position"]["next_index"]) == (9, 8, 10 * BATCH)
    assert "z-score" in entry["why"]
