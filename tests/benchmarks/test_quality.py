"""What the peer of a comparison of quality is given, and what is said of it; the peer itself is not there."""

import json
import stat
import sys

import numpy as np
import program
import pytest

from benchmarks import quality
from diffjax.data.emoji import load_emoji
from diffjax.samples import ask

CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({tiny!r})["get_config"]()
    config.cache_dir = {cache!r}
    return config
"""


@pytest.fixture
def config(cache_dir, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(tiny=str(program.TINY), cache=str(cache_dir)), encoding="utf-8")
    return path


def peer(tmp_path, code):
    """A program that stands for a Python with the peer in it."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\nworkdir = pathlib.Path(sys.argv[2])\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_peer_has_the_pictures_their_captions_and_what_is_asked(config, cache_dir, tmp_path, capfd):
    python = peer(
        tmp_path, 'assert sys.argv[1].endswith("quality_peer.py")\nprint(sorted(workdir.iterdir()))'
    )
    arguments = [str(config), "--minutes=1", "--images=5", f"--workdir={tmp_path / 'out'}"]
    quality.main(
        [*arguments, f"--peer-python={python}", "--guidance", "1", "3", "--unet", '{"dim_mults": [1, 2]}']
    )
    settings = json.loads((tmp_path / "out" / "settings.json").read_text(encoding="utf-8"))
    assert settings["unet"] == {"dim": 24, "dim_mults": [1, 2]}
    with np.load(tmp_path / "out" / "train.npz", allow_pickle=False) as given:
        count, side = given["images"].shape[:2]
        assert given["images"].dtype == np.uint8
        assert side == settings["resolution"]
        assert given["states"].shape[:2] == given["mask"].shape
        assert len(given["mask"]) == count
        # Every row of the mask is a caption's beginning, and what lies behind it is empty.
        assert given["mask"][:, 0].all()
        assert not given["states"][~given["mask"]].any()
        assert len({image.tobytes() for image in given["images"]}) > 1
        assert len(given["places"]) == len(given["captions"]) == 5
        captions = [str(caption) for caption in given["captions"]]
        places = given["places"].tolist()
        assert places == ask(range(count), 5).places
        source = load_emoji(cache_dir, resolution=side, num_concepts=8)
        assert captions == [source.captions[place] for place in places]
    told = capfd.readouterr().out
    assert "train.npz" in told
    commands = [line for line in told.splitlines() if "--mode=evaluate" in line]
    assert len(commands) == 3
    assert all(f"--config={config} --config.evaluate.stage=base" in command for command in commands)
    assert commands[-1].endswith(f"folder={tmp_path / 'out' / 'train-3'}")
    assert len(set(captions)) == 5


def test_a_peer_that_fails_is_said(config, tmp_path):
    python = peer(tmp_path, "sys.exit(3)")
    with pytest.raises(SystemExit, match="ended with status 3"):
        quality.main([str(config), "--minutes=1", f"--workdir={tmp_path}", f"--peer-python={python}"])
