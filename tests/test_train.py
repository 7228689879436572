import json

import numpy as np
import program
from PIL import Image
from runs import STAGES, metrics, saved_steps

from diffjax.train import train


def test_an_uninterrupted_run_leaves_what_it_promises(trained):
    for stage in STAGES:
        folder = trained / stage
        assert [line["step"] for line in metrics(folder)] == [2, 3, 4, 5, 6]
        assert all(np.isfinite(list(line.values())).all() for line in metrics(folder))
        previews = sorted((folder / "previews").iterdir())
        assert [path.name for path in previews] == ["00000003.png", "00000006.png"]
        with Image.open(previews[-1]) as preview:
            rows = 3 if stage == "super_resolution" else 2
            assert preview.width >= 2 * 64
            assert preview.height >= rows * 64
        boards = list((folder / "tensorboard").glob("events.*"))
        assert boards
        assert any(b"grad_norm" in board.read_bytes() for board in boards)
        assert (folder / "config.json").is_file()
    steps = json.loads((trained / "evaluation.json").read_text())["identity"]["steps"]
    assert steps == dict.fromkeys(STAGES, 6)
    with Image.open(trained / "sheet-train.png") as sheet:
        assert sheet.width > sheet.height / 2


def test_a_run_is_saved_by_the_clock_too(cache_dir, tmp_path):
    config = program.tiny_stage(cache_dir, 3)
    config.checkpoint.every, config.checkpoint.minutes = 1000, 1e-9
    train(config, tmp_path)
    assert saved_steps(tmp_path) == [1, 2, 3]
