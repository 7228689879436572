import json
import shutil

import numpy as np
import program
import pytest
from PIL import Image

from diffjax.diffusion.solvers import SOLVERS

PROMPTS = "red apple; Ärger in 東京 🍎"


@pytest.fixture
def sample(monkeypatch, capsys, cache_dir, trained, tmp_path):
    """Samples the trained cascade; returns the pictures by file name, and what was printed."""
    workdir = shutil.copytree(trained, tmp_path / "run")

    def call(*extra, prompts=PROMPTS):
        shutil.rmtree(workdir / "samples", ignore_errors=True)
        capsys.readouterr()
        arguments = program.arguments(
            workdir, cache_dir, "--mode=sample", f"--config.prompts={prompts}", *extra
        )
        status = program.call(monkeypatch, *arguments)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return {path.name: read(path) for path in sorted((workdir / "samples").iterdir())}, printed.out

    call.workdir = workdir
    return call


def read(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def assert_same_pictures(one, other):
    """The same up to a rounding: another batch size is another program."""
    assert one.keys() == other.keys()
    for name in one:
        assert abs(one[name] - other[name]).max() <= 1


@pytest.mark.slow
def test_pictures_depend_on_seed_prompt_and_number_only(sample):
    pictures, printed = sample("--config.num_per_prompt=5")
    assert list(pictures) == [
        *(f"0000-red-apple-{n}.png" for n in range(5)),
        *(f"0001-rger-in-{n}.png" for n in range(5)),
    ]
    assert all(picture.shape == (16, 16, 3) for picture in pictures.values())
    assert "base: 8 px, trained for 6 steps." in printed
    assert "10 images are in" in printed
    grid = read(sample.workdir / "grid.png")
    assert grid.shape[0] * grid.shape[1] >= 10 * 16 * 16
    names = list(pictures)
    for i, name in enumerate(names):  # every one is another picture
        assert all(abs(pictures[name] - pictures[other]).max() > 8 for other in names[:i])

    # What a picture says about itself.
    with Image.open(sample.workdir / "samples" / "0001-rger-in-2.png") as image:
        text = image.text
    assert text["prompt"] == "Ärger in 東京 🍎"
    assert (text["seed"], text["number"], text["Software"]) == ("0", "2", "diffjax")
    stages = json.loads(text["stages"])
    assert stages.keys() == {"base", "super_resolution"}
    assert stages["base"]["step"] == 6
    assert stages["base"]["num_steps"] == 2
    assert stages["base"]["solver"]["name"] in SOLVERS

    # One batch rather than two, fewer per prompt, prompts in another order: the same pictures.
    again, _ = sample("--config.num_per_prompt=5", "--config.batch_size=16")
    assert_same_pictures(pictures, again)
    alone, _ = sample(prompts="Ärger in 東京 🍎")
    assert_same_pictures({"0000-rger-in-0.png": pictures["0001-rger-in-0.png"]}, alone)
    other, _ = sample("--config.seed=1", "--config.num_per_prompt=5")
    assert other.keys() == pictures.keys()
    assert all(abs(other[name] - pictures[name]).max() > 8 for name in names)


@pytest.mark.slow
def test_prompts_come_from_a_file_and_a_long_one_is_cut_with_a_word_about_it(sample, tmp_path):
    long = "a red apple " * 40
    (tmp_path / "prompts.txt").write_text(f"black cat\n{long}\n", encoding="utf-8")
    pictures, printed = sample(f"--config.prompts_file={tmp_path}/prompts.txt")
    names = list(pictures)
    assert names[2] == "0002-black-cat-0.png"
    assert names[3].startswith("0003-a-red-apple-a-red-apple")
    assert len(names[3]) < 64
    assert "prompt 4 is longer than 16 tokens; its end is ignored." in printed
    assert printed.count("is longer than") == 1
