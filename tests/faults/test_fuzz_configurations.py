"""Configurations of strangers, kept beside runs or in checkpoints: one short error, or a stage."""

import copy
import json
import shutil

from fuzzing import CHANGES, EDITS, VALUES, changed, check_error, edited, fuzzed
from hypothesis import strategies as st
from networks import GOLDEN, golden_folder

from diffjax import run_config
from diffjax.check_config import check_stage
from diffjax.config import stage_config
from diffjax.errors import UserError
from diffjax.experiment import build_stage
from diffjax.interop.dit import FAMILIES
from diffjax.interop.model import open_network
from diffjax.interop.pipeline import open_pipeline
from diffjax.interop.text import read_tokenizer
from diffjax.text.pretrained import Tokenizer

# Words that mean something to Python, or to libraries that make objects of JSON.
NAMES = [
    "__class__",
    "__reduce__",
    "py/object",
    "_fields",
    "items",
    "lock",
    "a.b",
    "",
    "__init__",
    "_target_",
]


def small_config():
    config = stage_config()
    config.model = {"name": "dit", "patch": 4, "embed": 16, "depth": 1, "heads": 2, "classes": 2, "text": ""}
    config.conditions, config.resolution = ("label",), 16
    return json.loads(run_config.to_json(config))


CONFIG = small_config()


def build(folder) -> None:
    """What sampling and planning do with a run's configuration."""
    try:
        config = run_config.load(folder)
        check_stage(config)
        build_stage(config)
        run_config.to_json(config)
    except UserError as error:
        check_error(error)


@fuzzed(CHANGES, few=60, many=600)
def test_values_of_a_run(changes, folder):
    (folder / "config.json").write_text(json.dumps(changed(copy.deepcopy(CONFIG), changes)))
    build(folder)


@fuzzed(EDITS, few=60, many=600)
def test_bytes_of_a_run(edits, folder):
    (folder / "config.json").write_bytes(edited(json.dumps(CONFIG).encode(), edits))
    build(folder)


@fuzzed(st.tuples(st.sampled_from(NAMES), VALUES), few=60, many=2000)
def test_names_that_mean_something_to_python(made, folder):
    name, value = made
    for config in (CONFIG | {name: value}, CONFIG | {"data": CONFIG["data"] | {name: value}}):
        (folder / "config.json").write_text(json.dumps(config))
        try:
            run_config.to_json(run_config.load(folder))
        except UserError as error:
            check_error(error)


PIPELINE = {
    "model_index.json": {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": {"0": "tench", "1": "goldfish"},
    },
    "transformer/config.json": {
        **{"_class_name": "DiTTransformer2DModel", "in_channels": 4, "out_channels": 8},
        **{"sample_size": 32, "patch_size": 2},
    },
    "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8]},
    "scheduler/scheduler_config.json": {
        **{"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False},
        **{"beta_schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    },
}


@fuzzed(CHANGES, few=150, many=3000)
def test_configurations_of_a_pipeline(changes, folder):
    for name, value in changed(copy.deepcopy(PIPELINE), changes).items():
        path = folder / name
        if name in PIPELINE:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value))
    try:
        pipeline = open_pipeline(folder)
        if pipeline.process is not None:
            pipeline.sampler(2)
    except UserError as error:
        check_error(error)


@fuzzed(CHANGES, few=40, many=400)
def test_the_configuration_of_a_network(changes, folder):
    config = changed(json.loads((golden_folder(folder, "dit_apart") / "config.json").read_text()), changes)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        open_network(folder, FAMILIES).store.close()
    except UserError as error:
        check_error(error)


@fuzzed(st.tuples(st.sampled_from(["tokenizer_t5", "tokenizer_clip"]), st.integers(0, 9), CHANGES, EDITS,
                  st.booleans()), many=3000)  # fmt: skip
def test_files_of_a_tokenizer(made, folder):
    name, number, changes, edits, structured = made
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.copytree(GOLDEN / "text" / name, folder / "tokenizer")
    paths = sorted((folder / "tokenizer").iterdir())
    path = paths[number % len(paths)]
    if structured and path.suffix == ".json":
        path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))
    else:
        path.write_bytes(edited(path.read_bytes(), edits))
    try:
        tokenizer = Tokenizer(read_tokenizer(folder / "tokenizer"), 2**31)
        tokenizer.encode(["a red bird \0 東京", "x" * 3000], max(tokenizer.min_length, 8))
        tokenizer.counts(["a bird"])
    except UserError as error:
        check_error(error)
