"""`--mode=data`: what it says of a folder whose faults are known."""

import json
import shutil

import numpy as np
import program
import pytest
from pictures import write_pictures
from PIL import Image

from diffjax.data.rejects import Rejects
from diffjax.evaluation.grids import contact_sheet
from diffjax.experiment import build_source, find_bad

CONFIG = f"""
import runpy
def get_config(kind="stage"):
    config = runpy.run_path({str(program.TINY)!r})["get_config"]()
    if kind == "cascade":
        return config
    config = config.stages.base.train.copy_and_resolve_references()
    config.data.source, config.data.resolution = "folder", 16
    return config
"""


@pytest.fixture
def folder(tmp_path):
    """28 files: 3 truncated, 1 empty; one twice, one saved anew; an empty caption, and a long one."""
    folder = write_pictures(tmp_path / "pictures")
    shutil.copy(folder / "00.jpg", folder / "24.jpg")
    with Image.open(folder / "01.jpg") as image:
        image.save(folder / "25.jpg", quality=98, subsampling=0)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "26.png")
    (folder / "26.txt").write_text("word " * 40)
    Image.fromarray(np.full((40, 40, 3), 255, np.uint8)).save(folder / "27.png")
    (folder / "24.txt").write_text("picture 0")
    (folder / "25.txt").write_text("picture 1 again")
    return folder


def check(monkeypatch, tmp_path, *extra):
    (tmp_path / "config.py").write_text(CONFIG)
    return program.call(
        monkeypatch,
        f"--config={tmp_path / 'config.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--mode=data",
        *extra,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_with_faults(tmp_path, folder, monkeypatch, capsys):
    settings = [f"--config.data.folder={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    status = check(monkeypatch, tmp_path, *settings, "--config.data.max_rejects=0.2")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert (report["examples"], report["usable"], report["decoded"]) == (28, 24, 27)
    assert sum(report["rejected"].values()) == 4
    assert sorted(report["rejected"].values()) == [1, 3]
    captions = report["captions"]
    assert (captions["empty"], captions["longest_words"], captions["cut_off"]) == (1, 40, 1)
    assert captions["distinct"] == 23  # two are "picture 0"
    assert report["duplicates"] == {
        "same pixels": {"groups": 1, "more_than_one_each": 1},
        "alike": {"groups": 1, "more_than_one_each": 1},
    }
    assert lines(tmp_path / "run" / "data" / "duplicates.jsonl") == [
        {"kind": "same pixels", "keys": ["00.jpg", "24.jpg"]},
        {"kind": "alike", "keys": ["01.jpg", "25.jpg"]},
    ]
    rejected = {line["key"] for line in lines(tmp_path / "run" / "data" / "rejects.jsonl")}
    assert rejected == {"03.jpg", "05.jpg", "07.jpg", "08.jpg"}
    with Image.open(tmp_path / "run" / "data" / "sheet.png") as sheet:
        assert sheet.size == (8 * 132 + 4, 3 * 150 + 4)
    assert "24 of 28 examples usable" in printed.out
    assert "03.jpg, 07.jpg, 08.jpg" in printed.out.replace("\n", " ")


def test_training_finds_what_was_found(tmp_path, folder, monkeypatch):
    import runpy

    settings = [f"--config.data.folder={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    assert check(monkeypatch, tmp_path, *settings, "--config.data.max_rejects=0.2") == 0
    config = runpy.run_path(str(tmp_path / "config.py"))["get_config"]()
    config.data.update(folder=str(folder), cache_dir=str(tmp_path / "cache"), check="decode")
    config.data.update(num_threads=1, flip=True)
    found = find_bad(config.data, build_source(config.data))
    assert found.decoded == 0
    assert np.count_nonzero(found.reasons) == 3


def test_too_many_bad_ones_are_a_failure_that_leaves_the_report(tmp_path, folder, monkeypatch, capsys):
    settings = [f"--config.data.folder={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    assert check(monkeypatch, tmp_path, *settings) == 2
    assert "4 of 28 examples cannot be used, more than data.max_rejects=0.01" in capsys.readouterr().err
    assert (tmp_path / "run" / "data" / "report.json").is_file()
    # What was mended is seen at once.
    for i in (3, 5, 7, 8):
        shutil.copy(folder / "02.jpg", folder / f"{i:02d}.jpg")
    assert check(monkeypatch, tmp_path, *settings) == 0
    assert len(Rejects(tmp_path / "run" / "data", resumed=True)) == 0


def test_stages_of_one_data_set_are_checked_once(tmp_path, cache_dir, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    status = program.call(
        monkeypatch,
        f"--config={tmp_path / 'config.py'}:cascade",
        f"--workdir={tmp_path / 'run'}",
        "--mode=data",
        f"--config.cache_dir={cache_dir}",
    )
    assert status == 0
    assert capsys.readouterr().out.count("examples usable") == 1
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["examples"] == report["usable"] == 16
    assert report["classes"]["most"] == 2


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 1), (9, 2)])
def test_a_contact_sheet_puts_captions_under_pictures(count, rows):
    colours = np.random.default_rng(0).integers(0, 256, (count, 3), dtype=np.uint8)
    pictures = [(np.broadcast_to(colour, (32, 32, 3)), "猫 a cat " * 9) for colour in colours]
    canvas = contact_sheet(pictures, side=64)
    assert canvas.shape == (rows * 86 + 4, min(count, 8) * 68 + 4, 3)
    for i, colour in enumerate(colours):
        top, left = 4 + i // 8 * 86, 4 + i % 8 * 68
        np.testing.assert_array_equal(
            canvas[top : top + 64, left : left + 64], np.broadcast_to(colour, (64, 64, 3))
        )
        caption = canvas[top + 64 : top + 82, left : left + 64]
        assert (caption < 200).any()
