"""Every configuration that is shipped: it loads, fits together, and says what it is."""

import ast
import importlib
from pathlib import Path

import pytest

from diffjax import experiment
from diffjax.config import is_cascade, to_json

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
MINILM_EMBED = 384


def load(path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).get_config()


def stages_of(config):
    """The stages that a configuration trains."""
    if not is_cascade(config):
        return {"": config}
    return {name: entry.train for name, entry in config.stages.items() if "train" in entry}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_states_command_hardware_time_and_result(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    for heading in ("Command:", "Hardware:", "Time:", "Result:"):
        assert heading in header
    assert str(path.relative_to(ROOT)) in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_builds(path):
    config = load(path)
    to_json(config)
    for stage in stages_of(config).values():
        experiment.build_stage(stage, text_embed=MINILM_EMBED)
        experiment.build_optimizer(stage)
        experiment.build_sampler(stage.preview.sampler, "preview.sampler")
    for name in config.get("stages", ()):
        experiment.build_sampler(config.stages[name].sampler, name)


@pytest.mark.parametrize(("low", "high"), [("base64", "sr256"), ("sr256", "sr1024")])
def test_stages_of_the_emoji_cascade_fit_together(low, high):
    first, second = (load(ROOT / "configs" / "emoji" / f"{name}.py") for name in (low, high))
    assert second.low_res.resolution == first.resolution
    assert (first.text, first.data.source) == (second.text, second.data.source)


def test_both_super_resolution_stages_are_configurations_of_one_network():
    settings = [load(ROOT / "configs" / "emoji" / f"{name}.py").model for name in ("sr256", "sr1024")]
    assert all(model.name == "unet" and model.efficient for model in settings)
    assert set(settings[0]) == set(settings[1])


def test_the_number_of_steps_of_the_quickstart_reaches_its_stages():
    config = load(ROOT / "configs" / "quickstart.py")
    config.steps, config.sr_steps = 7, 5
    assert (config.stages.base.train.steps, config.stages.sr.train.steps) == (7, 5)
