import json
import signal

import numpy as np
import program
import pytest
from PIL import Image

from diffjax.training.checkpoint import FOLDER

STAGES = ("base", "super_resolution")

# Where a run is killed, one after the other, and each time the same command goes on; see
# `program.DRIVER`. The saves are of steps 2, 4 and 6 of each stage, and are written in the background.
KILLS = [
    ("diffjax.training.metrics:MetricsBuffer.add", 1, 0.0),  # in the first stage, before the first checkpoint
    ("diffjax.training.checkpoint:Checkpoints.save", 1, 0.01),  # while the first checkpoint is being written
    ("diffjax.training.checkpoint:Checkpoints.save", 2, 0.0),  # the next one has just been started
    ("diffjax.training.metrics:MetricsBuffer.add", 5, 0.003),  # in the second stage, between two checkpoints
    ("diffjax.training.checkpoint:Checkpoints.wait", 1, 0.0),  # after the last checkpoint
    ("diffjax.cascade:generate", 1, 0.0),  # in the evaluation
]
SIGNALS = [
    ("diffjax.training.metrics:MetricsBuffer.add", 3, 0.0, signal.SIGINT),
    ("diffjax.training.metrics:MetricsBuffer.add", 4, 0.0, signal.SIGTERM),
]


def arrays(workdir, stage, step=6):
    """Every array of a checkpoint, by item and name."""
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "ema_params", "rest"):
        tree = ocp.StandardCheckpointer().restore(workdir / stage / FOLDER / str(step) / item)
        for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items():
            found[f"{item}/{path}"] = np.asarray(leaf)
    return found


def assert_equal_runs(workdir, reference):
    for stage in STAGES:
        one, other = arrays(workdir, stage), arrays(reference, stage)
        assert one.keys() == other.keys()
        assert len(one) > 50
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{stage}: {name}")
        data = [folder / stage / FOLDER / "6" / "data" / "metadata" for folder in (workdir, reference)]
        assert data[0].read_bytes() == data[1].read_bytes()
        for folder in (workdir, reference):
            left = sorted(path.name for path in (folder / stage / FOLDER).iterdir())
            assert left == ["4", "6"]


def metrics(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(workdir, reference):
    for stage in STAGES:
        steps = [line["step"] for line in metrics(workdir, stage)]
        assert steps == sorted(set(steps))
        assert steps[-1] == 6
        known = {line["step"]: line for line in metrics(reference, stage)}
        for line in metrics(workdir, stage):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert line[name] == known[line["step"]][name]


def test_an_uninterrupted_run_leaves_what_it_promises(trained):
    for stage in STAGES:
        assert [line["step"] for line in metrics(trained, stage)] == [2, 3, 4, 5, 6]
        assert all(np.isfinite(list(line.values())).all() for line in metrics(trained, stage))
        previews = sorted((trained / stage / "previews").iterdir())
        assert [path.name for path in previews] == ["00000003.png", "00000006.png"]
        with Image.open(previews[-1]) as preview:
            rows = 3 if stage == "super_resolution" else 2
            assert preview.width >= 2 * 64
            assert preview.height >= rows * 64
        boards = list((trained / stage / "tensorboard").glob("events.*"))
        assert boards
        assert any(b"grad_norm" in board.read_bytes() for board in boards)
        assert (trained / stage / "config.json").is_file()
    assert json.loads((trained / "evaluation.json").read_text())["identity"]["steps"] == dict.fromkeys(
        STAGES, 6
    )
    with Image.open(trained / "sheet-train.png") as sheet:
        assert sheet.width > sheet.height / 2


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(trained, cache_dir, tmp_path):
    workdir = tmp_path / "run"
    for kill in KILLS:
        stopped = program.start(workdir, cache_dir, signal=(*kill, int(signal.SIGKILL)))
        assert stopped.returncode == -signal.SIGKILL, (kill, stopped.stdout, stopped.stderr)
    done = program.start(workdir, cache_dir)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(workdir, trained)
    assert_same_metrics(workdir, trained)
    one, other = ((folder / "evaluation.json").read_text() for folder in (workdir, trained))
    assert one == other


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(trained, cache_dir, tmp_path):
    workdir = tmp_path / "run"
    step = 0
    for where, count, delay, number in SIGNALS:
        stopped = program.start(workdir, cache_dir, "--mode=train", signal=(where, count, delay, int(number)))
        assert stopped.returncode == 75, stopped.stderr
        assert len(stopped.stderr.splitlines()) == 1
        assert number.name in stopped.stderr
        assert "saved" in stopped.stderr
        step += count
        stage, saved = STAGES[step > 6], step - 6 * (step > 6)
        assert f"step {saved}" in stopped.stderr
        assert (workdir / stage / FOLDER / str(saved)).is_dir()
    done = program.start(workdir, cache_dir, "--mode=train")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(workdir, trained)
