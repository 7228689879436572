"""Whole pipelines of diffusers, all of whose parameters are random: our pictures are the original's."""

import importlib
import json
import math
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from networks import GOLDEN
from PIL import Image
from safetensors.numpy import save_file

from diffjax import cascade as cascades
from diffjax import stage as stages
from diffjax.config import cascade_config, cascade_stage, public_sampler, stage_config
from diffjax.diffusion import noise
from diffjax.errors import UserError
from diffjax.interop.pipeline import open_pipeline
from diffjax.pretrained import adopt
from diffjax.train import train
from diffjax.training.state import count_params

TEXTS = {
    "sd": ("clip_l",),
    "sd_ddim": ("clip_l",),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_lp", "clip_g", "t5"),
    "flux": ("clip_l", "t5"),
    "pixart": ("t5",),
    "if": ("t5",),
    "if_sr": ("t5",),
}
TOKENIZERS = {
    "clip_l": "tokenizer_clip",
    "clip_lp": "tokenizer_clip",
    "clip_g": "tokenizer_clip_g",
    "t5": "tokenizer_t5",
}
TOLERANCE = 1e-3


def fill(name, shape):
    """A parameter's values, the same as in golden/make_pipelines.py."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        values *= (0.4 if "conv_out" in name else 1.0) * np.prod(shape[1:]) ** -0.5
    else:
        values = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * values
    return values.astype(np.float32)


def write_folder(folder, kind):
    """The folder of a golden pipeline, and its arrays."""
    with np.load(GOLDEN / f"pipeline_{kind}.npz") as file:
        golden = dict(file)
    for name, content in json.loads(str(golden["files"])).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for part, shapes in json.loads(str(golden["shapes"])).items():
        tensors = {name: fill(name, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for number, name in zip(("", "_2", "_3"), TEXTS.get(kind, ()), strict=False):
        shutil.copytree(GOLDEN / "text" / name, folder / f"text_encoder{number}")
        shutil.copytree(GOLDEN / "text" / TOKENIZERS[name], folder / f"tokenizer{number}")
    golden["call"] = json.loads(str(golden["call"]))
    return golden


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = jax.make_mesh(
        (1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    for module in ("diffjax.cascade", "diffjax.run"):
        monkeypatch.setattr(f"{module}.make_mesh", lambda **_: mesh)


def key_data(key):
    return np.asarray(jax.random.key_data(key))


def given_noises(cascade, goldens, folders, keys):
    """The words of each key that will be drawn from, and the noise that the original drew there."""
    words, drawn = {}, {}
    for number, (item, golden, folder) in enumerate(zip(cascade.stages, goldens, folders, strict=True)):
        noises = [np.moveaxis(golden[f"noise{i}"], 1, -1) for i in range(20) if f"noise{i}" in golden]
        sampler = open_pipeline(folder).sampler(item.settings.num_steps, resolution=item.config.resolution)
        times = item.settings.times(item.stage.schedule, item.settings.num_steps)
        first = noises.pop(0) * sampler.start_std / np.asarray(item.stage.schedule(times[0]).sigma)
        aug = noises.pop(0) if item.stage.low_res else None
        for row, key in enumerate(keys):
            own = jax.random.fold_in(key, number)
            ours, low = (jax.random.fold_in(own, i) for i in range(2))
            found = [(jax.random.fold_in(ours, step), value) for step, value in enumerate([first, *noises])]
            found += [(low, aug)] if aug is not None else []
            for place, value in found:
                words.setdefault(value.shape[1:], []).append(key_data(place))
                drawn.setdefault(value.shape[1:], []).append(value[row])
    return words, drawn


def replace_noise(monkeypatch, words, drawn):
    """In place of `normal_like`: what the original drew, found by each example's key."""

    def normal_like(keys, x, draw=0):
        shape = x.shape[1:]
        if shape not in words:
            raise AssertionError(f"the original draws nothing of the shape {shape}")
        same = (jnp.asarray(np.stack(words[shape])) == jax.random.key_data(keys)[:, None]).all(axis=-1)
        values = jnp.asarray(np.stack(drawn[shape]))[same.argmax(axis=1)]
        # A step that draws where the original did not must not matter: the last one.
        return jnp.where(same.any(axis=1).reshape(-1, *(1,) * len(shape)), values, 0.0)

    monkeypatch.setattr(noise, "normal_like", normal_like)


def cascade_of(family, golden, **changes):
    """The cascade of a family's configuration, called as the original was."""
    config = importlib.import_module(f"configs.pretrained.{family}").get_config()
    config.update(changes)
    sampler = config.stages.base.sampler
    sampler.num_steps = golden["call"]["num_inference_steps"]
    if family != "flux":
        sampler.guidance_scale = golden["call"]["guidance_scale"]
    return config


def pictures(monkeypatch, config, folders, goldens, workdir):
    """What our path makes of the original's prompts and noises: for each stage, images in [0, 1]."""
    cascade = cascades.open_cascade(config, workdir)
    call = goldens[0]["call"]
    prompts = [str(label) for label in call.get("class_labels", [])] or call["prompt"]
    cond = cascades.encode_prompts(cascade, prompts, print)
    keys = cascades.image_keys(0, prompts, range(len(prompts)))
    replace_noise(monkeypatch, *given_noises(cascade, goldens, folders, keys))
    monkeypatch.setattr(stages, "to_pixels", lambda images: jnp.clip(images / 2.0 + 0.5, 0.0, 1.0))
    return cascades.generate(cascade, cond, keys, batch_size=len(prompts))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("dit", "dit"),
        pytest.param("dit", "dit_ddpm", marks=pytest.mark.slow),
        ("sd15", "sd_ddim"),
        pytest.param("sd15", "sd", marks=pytest.mark.slow),
        pytest.param("sd15", "sdxl", marks=pytest.mark.slow),
        ("sd3", "sd3"),
        ("flux", "flux"),
        ("pixart", "pixart"),
    ],
)
def test_a_pipeline_makes_the_originals_pictures(family, kind, monkeypatch, tmp_path):
    golden = write_folder(tmp_path, kind)
    config = cascade_of(family, golden, init_from=str(tmp_path), resolution=16 if kind == "flux" else 0)
    (images,) = pictures(monkeypatch, config, [tmp_path], [golden], tmp_path)
    assert images.shape == golden["image"].shape
    assert golden["image"].std() > 0.1
    np.testing.assert_allclose(images, golden["image"], rtol=0.0, atol=TOLERANCE)


@pytest.mark.slow
def test_both_stages_of_deepfloyd_make_the_originals_pictures(monkeypatch, tmp_path):
    folders, kinds = [tmp_path / "one", tmp_path / "two"], ["if", "if_sr"]
    goldens = [write_folder(folder, kind) for folder, kind in zip(folders, kinds, strict=True)]
    config = cascade_of("deepfloyd", goldens[0], init_from=str(folders[0]), sr_init_from=str(folders[1]))
    config.stages.sr.sampler.num_steps = goldens[1]["call"]["num_inference_steps"]
    config.stages.sr.sampler.guidance_scale = goldens[1]["call"]["guidance_scale"]
    assert math.isclose(config.stages.sr.sampler.aug_level, (goldens[1]["call"]["noise_level"] + 1) / 1000)
    for images, golden in zip(
        pictures(monkeypatch, config, folders, goldens, tmp_path), goldens, strict=True
    ):
        assert images.shape == golden["image"].shape
        np.testing.assert_allclose(images, golden["image"], rtol=0.0, atol=TOLERANCE)


def test_other_noise_levels_of_low_resolution_images_are_refused(tmp_path):
    write_folder(tmp_path, "if_sr")
    file = tmp_path / "image_noising_scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_schedule": "linear"}))
    config = stage_config()
    config.init_from = str(tmp_path)
    with pytest.raises(UserError, match="image_noising_scheduler has other noise levels"):
        adopt(config)


@pytest.mark.slow
def test_prompts_become_pictures_by_one_command(monkeypatch, capsys, tmp_path):
    write_folder(tmp_path / "folder", "sd_ddim")
    status = program.call(
        monkeypatch,
        "--mode=sample",
        f"--config={program.ROOT / 'configs' / 'pretrained' / 'sd15.py'}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init_from={tmp_path / 'folder'}",
        "--config.prompts=the red bird; a tree by the sea",
        "--config.batch_size=2",
        "--config.stages.base.sampler.num_steps=2",
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "base: 16 px, public weights." in printed.out
    paths = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in paths] == ["0000-the-red-bird-0.png", "0001-a-tree-by-the-sea-0.png"]
    one, other = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert one.shape == (16, 16, 3)
    assert one.std() > 5.0
    assert np.abs(one - other).max() > 5


@pytest.mark.slow
def test_training_goes_on_from_public_weights(tmp_path):
    folder, workdir = tmp_path / "folder", tmp_path / "run"
    write_folder(folder, "sd_ddim")
    config = stage_config()
    config.init_from = str(folder)
    config.resolution = config.data.resolution = 0
    config.model = {"name": "public"}
    config.steps, config.batch_size, config.log_every = 2, 4, 1
    config.data.update(cache_dir=str(tmp_path / "cache"), num_concepts=4, num_threads=1)
    config.optimizer.update(learning_rate=1e-5, warmup_steps=0)
    config.preview.update(every=2, count=2, sampler=public_sampler(num_steps=2, guidance_scale=3.0))
    train(config, workdir)
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert np.isfinite(losses).all()

    # The run is a stage like any other, and after two small steps almost the public one.
    sampler = public_sampler(num_steps=2, guidance_scale=3.0)
    config = cascade_config()
    config.stages.run = cascade_stage(str(workdir), sampler)
    (ours,) = cascades.open_cascade(config, tmp_path).stages
    public = importlib.import_module("configs.pretrained.sd15").get_config()
    public.init_from = str(folder)
    (theirs,) = cascades.open_cascade(public, tmp_path).stages
    assert ours.step == 2
    assert ours.stage.prediction is theirs.stage.prediction
    assert count_params(ours.params) == count_params(theirs.params)
    distances = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours.params, theirs.params)
    assert 0.0 < max(jax.tree.leaves(distances)) < 1e-4
