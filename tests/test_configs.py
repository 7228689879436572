"""Every configuration that is shipped: it loads, fits together, and says what it is."""

import ast
import importlib
from pathlib import Path

import pytest

from diffjax import experiment
from diffjax.config import is_cascade
from diffjax.run_config import to_json
from diffjax.train import train
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.state import count_params

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
MINILM_EMBED = 384


def load(path, variant=""):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return module.get_config(*[variant] if variant else [])


def widths_of(stage):
    """The widths of the text that a stage is told: MiniLM's, T5-XXL's, or those of SD3's three encoders."""
    if stage.text.encoder == "minilm":
        return {"text_embed": MINILM_EMBED}
    return {"text_embed": 4096, "pooled_embed": 2048 if stage.model.name == "mmdit" else 4096}


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
        model = experiment.build_stage(stage, **widths_of(stage))
        experiment.build_optimizer(stage)
        settings = experiment.build_sampler(stage.preview.sampler, "preview.sampler")
        experiment.check_sampler(model.stage, settings, "preview.sampler")
    for name, entry in config.get("stages", {}).items():
        if "public" not in entry:  # those have the checkpoint's own sampler
            experiment.build_sampler(entry.sampler, name)


# Parameters in millions, as published or as the papers' tables round them.
PUBLISHED = {
    ("dit/imagenet256", "S/2"): 33,
    ("dit/imagenet256", "B/2"): 130,
    ("dit/imagenet256", "L/2"): 458,
    ("dit/imagenet256", "XL/2"): 675,
    ("sit/imagenet256", "XL/2"): 675,
    ("jit/imagenet256", "B/16"): 131,
    ("jit/imagenet256", "L/16"): 459,
    ("jit/imagenet256", "H/16"): 953,
    ("edm2/imagenet512", "xs"): 125,
    ("edm2/imagenet512", "s"): 280,
    ("edm2/imagenet512", "m"): 498,
    ("edm2/imagenet512", "l"): 777,
    ("edm2/imagenet512", "xl"): 1119,
    ("edm2/imagenet512", "xxl"): 1523,
    ("ddpm/cifar10", ""): 35.7,
    ("flow/cifar10", "ot"): 35.7,
    ("imagen/base64", "2b"): 2000,
    ("imagen/base64", "500m"): 500,
    ("imagen/sr256", "600m"): 600,
    ("imagen/sr256", "400m"): 400,
    ("imagen/sr1024", "600m"): 600,
}
# Imagen's are names more than counts, and do not say how wide the text is; here it is T5-XXL's.
WITHIN = {("imagen/base64", "2b"): 0.11, ("imagen/base64", "500m"): 0.12}


@pytest.mark.parametrize(("name", "variant"), PUBLISHED, ids="-".join)
def test_recipes_have_the_published_number_of_parameters(name, variant):
    config = load(ROOT / "configs" / f"{name}.py", variant)
    shapes = experiment.build_stage(config, **widths_of(config)).shapes
    count = count_params(shapes["net"] if config.diffusion.uncertainty else shapes)
    # Some tables round up, and some do not count the fixed positions.
    within = WITHIN.get((name, variant), 0.05 if name.startswith("imagen/") else 0.005)
    assert count / 1e6 == pytest.approx(PUBLISHED[name, variant], rel=within)


TINY = [path for path in FILES if '"tiny"' in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=lambda path: "-".join(path.relative_to(ROOT / "configs").parts))
def test_the_tiny_variant_of_a_recipe_trains(path, cache_dir, tmp_path):
    config = load(path, "tiny")
    config.data.cache_dir = str(cache_dir)
    train(config, tmp_path)
    restored = Checkpoints(tmp_path)
    assert restored.latest_step() == 10
    restored.close()


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
