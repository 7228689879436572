"""Checkpoints as a whole: what their folders say, also if they are not there in full or mean ill."""

import json

import pytest

from diffjax.errors import UserError
from diffjax.interop.pipeline import KINDS, open_pipeline, write_pipeline_index
from diffjax.interop.process import scheduler_config

VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
WIDE_VAE = VAE | {"latent_channels": 16}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DIT = {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "out_channels": 8, "sample_size": 32}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64}
FLUX = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "patch_size": 1, "guidance_embeds": True}
SD3 = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "out_channels": 16, "sample_size": 128}
PIXART = {"_class_name": "PixArtTransformer2DModel", "in_channels": 4, "out_channels": 8, "sample_size": 128}
TEXT = {"architectures": ["CLIPTextModel"]}
TOKENIZER = {"tokenizer_class": "CLIPTokenizer"}


def write(folder, class_name, extra=None, **parts):
    """A pipeline of these parts; None is a part that the index calls absent."""
    index = {"_class_name": class_name, "_diffusers_version": "0.42.1", **(extra or {})}
    for name, config in parts.items():
        index[name] = [None, None] if config is None else ["library", "Class"]
        if config is not None:
            file = "scheduler_config" if "scheduler" in name else "config"
            (folder / name).mkdir(parents=True)
            (folder / name / f"{file}.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def texts(count):
    suffixes = ("", "_2", "_3")[:count]
    parts = {f"text_encoder{suffix}": TEXT for suffix in suffixes}
    return parts | {f"tokenizer{suffix}": TOKENIZER for suffix in suffixes}


def test_dit(tmp_path):
    labels = {"id2label": {"1": "goldfish", "0": "tench", "2": "shark"}}
    parts = {"transformer": DIT, "vae": VAE, "scheduler": DDIM}
    found = open_pipeline(write(tmp_path, "DiTPipeline", labels, **parts))
    assert found.kind.name == "dit"
    assert found.components == {name: tmp_path / name for name in parts}
    assert (found.denoiser, found.channels, found.scale, found.resolution) == ("transformer", 4, 8, 256)
    assert found.labels == ("tench", "goldfish", "shark")
    assert found.learned_variance
    assert found.process.schedule["name"] == "ddpm"
    assert (found.kind.guidance_scale, found.kind.text_length, found.sampler().num_steps) == (4.0, 0, 50)
    assert found.text_encoders() == {}


@pytest.mark.parametrize(
    ("class_name", "parts", "count", "expected"),
    [
        ("StableDiffusionPipeline", {"unet": UNET, "vae": VAE}, 1, ("unet", 4, 8, 512, 7.5, 50, 77)),
        (
            "StableDiffusionXLPipeline",
            {"unet": UNET | {"sample_size": 128}, "vae": VAE},
            2,
            ("unet", 4, 8, 1024, 5.0, 50, 77),
        ),
        (
            "PixArtAlphaPipeline",
            {"transformer": PIXART, "vae": VAE},
            1,
            ("transformer", 4, 8, 1024, 4.5, 20, 120),
        ),
        (
            "StableDiffusion3Pipeline",
            {"transformer": SD3, "vae": WIDE_VAE},
            3,
            ("transformer", 16, 8, 1024, 7.0, 28, 256),
        ),
        (
            "FluxPipeline",
            {"transformer": FLUX, "vae": WIDE_VAE},
            2,
            ("transformer", 16, 8, 1024, 3.5, 28, 512),
        ),
        (
            "FluxPipeline",
            {"transformer": FLUX | {"guidance_embeds": False}, "vae": WIDE_VAE},
            2,
            ("transformer", 16, 8, 1024, 1.0, 4, 256),
        ),
        (
            "IFPipeline",
            {"unet": UNET | {"in_channels": 3, "out_channels": 6}},
            1,
            ("unet", 3, 1, 64, 7.0, 100, 77),
        ),
    ],
)
def test_other_kinds(tmp_path, class_name, parts, count, expected):
    flow = "Flux" in class_name or "Diffusion3" in class_name
    parts = {**parts, **texts(count), "scheduler": FLOW if flow else DDIM, "safety_checker": None}
    found = open_pipeline(write(tmp_path, class_name, **parts))
    kind = found.kind
    numbers = (kind.guidance_scale, kind.num_steps, kind.text_length)
    assert (found.denoiser, found.channels, found.scale, found.resolution, *numbers) == expected
    assert len(found.text_encoders()) == count
    assert found.sampler().num_steps == kind.num_steps
    assert found.guidance_embedded == (expected[4] == 3.5)
    assert found.zero_null_text == (kind.name == "sdxl")
    assert found.learned_variance == (kind.name in ("pixart", "if"))


def test_if_super_resolution(tmp_path):
    unet = UNET | {"in_channels": 6, "out_channels": 6, "sample_size": 256}
    noising = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    learned = noising | {"variance_type": "learned_range", "thresholding": True, "sample_max_value": 1.0}
    parts = {"unet": unet, "scheduler": learned, "image_noising_scheduler": noising, **texts(1)}
    found = open_pipeline(write(tmp_path, "IFSuperResolutionPipeline", **parts))
    assert (found.channels, found.scale, found.resolution) == (3, 1, 256)
    assert found.learned_variance
    assert found.image_noise.schedule == {"name": "ddpm", "num_steps": 1000, "betas": "cosine"}
    assert found.sampler().solver == {"name": "ddpm", "variance": "learned"}


def test_the_shift_of_flux_depends_on_the_resolution(tmp_path):
    dynamic = FLOW | {"use_dynamic_shifting": True}
    parts = {"transformer": FLUX, "vae": WIDE_VAE, "scheduler": dynamic, **texts(2)}
    found = open_pipeline(write(tmp_path, "FluxPipeline", **parts))
    for resolution, shift in ((1024, 3.1582), (256, 1.6487), (0, 3.1582)):  # exp(1.15), exp(0.5)
        times = found.sampler(resolution=resolution).times
        assert times == {"name": "shifted", "shift": pytest.approx(shift, rel=1e-4), "last": 0.0}


def test_a_text_encoder_that_was_left_out(tmp_path):
    parts = {"transformer": SD3, "vae": WIDE_VAE, "scheduler": FLOW, **texts(2)}
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    found = open_pipeline(write(tmp_path, "StableDiffusion3Pipeline", **parts))
    assert list(found.text_encoders()) == ["text_encoder", "text_encoder_2"]
    with pytest.raises(UserError, match=r"has no text_encoder_3, only .*; get that folder too"):
        found.component("text_encoder_3")


@pytest.mark.parametrize(
    ("config", "kind", "resolution"),
    [
        (DIT, "dit", 256),
        (DIT | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}, "dit", 256),
        (PIXART | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "pixart", 1024),
        (PIXART, "pixart", 1024),
        (SD3, "sd3", 1024),
        (FLUX, "flux", 1024),
        (UNET, "sd", 512),
        (UNET | {"addition_embed_type": "text_time", "sample_size": 128}, "sdxl", 1024),
        (UNET | {"in_channels": 3}, "if", 64),
        (UNET | {"in_channels": 6, "sample_size": 256}, "if_super_resolution", 256),
    ],
)
def test_a_network_alone_or_in_its_subfolder(tmp_path, config, kind, resolution):
    name = "unet" if "UNet" in config["_class_name"] else "transformer"
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path, tmp_path / name):
        found = open_pipeline(folder)
        assert (found.kind.name, found.denoiser, found.resolution) == (kind, name, resolution)
        assert found.components == {name: tmp_path / name}
        assert found.process is None
        with pytest.raises(UserError, match="has no scheduler"):
            found.sampler()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(DDIM))
    assert open_pipeline(tmp_path).process.scheduler == "DDIMScheduler"


GOOD = {"transformer": DIT, "vae": VAE, "scheduler": DDIM}


@pytest.mark.parametrize(
    ("class_name", "extra", "parts", "message"),
    [
        ("ShapEPipeline", {}, GOOD, "is of a 'ShapEPipeline'; supported are DiTPipeline"),
        ("DiTPipeline", {}, {"vae": VAE, "scheduler": DDIM}, "has neither model_index.json nor"),
        ("DiTPipeline", {}, {"transformer": DIT, "vae": VAE}, "has no scheduler; get that folder too"),
        (
            "DiTPipeline",
            {"../vae": ["a", "b"]},
            GOOD,
            "names the part '../vae'; expected the name of a folder",
        ),
        ("DiTPipeline", {"/etc": ["a", "b"]}, GOOD, "names the part '/etc'"),
        ("DiTPipeline", {"..": ["a", "b"]}, GOOD, r"names the part '\.\.'"),
        ("DiTPipeline", {"id2label": {"0": "a", "2": "b"}}, GOOD, "id2label is not a name for each number"),
        ("DiTPipeline", {"id2label": ["a"]}, GOOD, "id2label is not a name for each number"),
        (
            "DiTPipeline",
            {},
            GOOD | {"scheduler": {"_class_name": "Odd"}},
            "scheduler_config.json: is of a 'Odd'",
        ),
        (
            "DiTPipeline",
            {},
            GOOD | {"vae": VAE | {"block_out_channels": 4}},
            "block_out_channels is 4; expected",
        ),
        ("DiTPipeline", {}, GOOD | {"transformer": DIT | {"sample_size": "big"}}, "sample_size is 'big'"),
        (
            "StableDiffusionPipeline",
            {},
            {"unet": UNET | {"in_channels": 9}, "vae": VAE, "scheduler": DDIM},
            "reads 9 channels, of which 4 are latents; .* inpainting, are not supported",
        ),
    ],
)
def test_what_cannot_be_opened(tmp_path, class_name, extra, parts, message):
    with pytest.raises(UserError, match=message):
        open_pipeline(write(tmp_path, class_name, extra, **parts))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is no folder; expected a checkpoint of diffusers"):
        open_pipeline(tmp_path / "gone")
    with pytest.raises(UserError, match=r"has neither model_index.json nor config.json"):
        open_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        open_pipeline(tmp_path)


def test_the_cache_of_hugging_face_consists_of_links(tmp_path):
    repo = tmp_path / "models--someone--dit"
    write(snapshot := repo / "snapshots" / "0123abcd", "DiTPipeline", **GOOD)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.rglob("*.json"))):
        blob = repo / "blobs" / f"{i:040x}"
        file.rename(blob)
        file.symlink_to(blob)
    assert open_pipeline(snapshot).kind.name == "dit"
    assert open_pipeline(snapshot / "transformer").kind.name == "dit"
    (tmp_path / "here").symlink_to(snapshot)
    assert open_pipeline(tmp_path / "here").kind.name == "dit"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path, what):
    folder = write(tmp_path / "model", "DiTPipeline", **GOOD)
    (folder / "vae").rename(tmp_path / "vae")
    if what == "folder":
        (folder / "vae").symlink_to(tmp_path / "vae")
    else:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").symlink_to(tmp_path / "vae" / "config.json")
    with pytest.raises(UserError, match=r"is a link out of the checkpoint, to .*; put the file in its place"):
        open_pipeline(folder)


def test_an_index_is_written_for_what_is_there(tmp_path):
    parts = {"transformer": DIT, "vae": VAE, "text_encoder": TEXT}
    write(tmp_path, "DiTPipeline", **parts)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    scheduler = scheduler_config({"name": "ddpm"}, {"name": "eps"}, {"name": "timestep"})
    write_pipeline_index(tmp_path, "DiTPipeline", scheduler=scheduler, labels=("tench", "goldfish"))
    assert json.loads((tmp_path / "model_index.json").read_text()) == {
        "_class_name": "DiTPipeline",
        "id2label": {"0": "tench", "1": "goldfish"},
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    found = open_pipeline(tmp_path)
    assert found.labels == ("tench", "goldfish")
    assert found.process.scheduler == "DDPMScheduler"
    with pytest.raises(UserError, match=f"there is no 'Dit'; expected one of {', '.join(KINDS)}"):
        write_pipeline_index(tmp_path, "Dit")
