"""Makes pipeline_*.npz: pictures of whole pipelines of diffusers, all of whose parameters are random.

The parameters follow from their names, see `fill`, so only the configurations, the shapes and what came out
are stored; the text encoders are those of `text/`, see make_text.py. Each file holds `files` (JSON by path),
`shapes` of parameters by network and name, `call`, `noises` in the order in which they were drawn, and
`image` in [0, 1].

Run in an environment with torch (CPU), transformers 5 and diffusers: `python tests/golden/make_pipelines.py`.
"""

import contextlib
import json
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
PROMPTS = ["the red bird sings by the sea", "A tree"]
STEPS = 5
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TEXTS = {
    "clip_l": (transformers.CLIPTextModel, "tokenizer_clip"),
    "clip_lp": (transformers.CLIPTextModelWithProjection, "tokenizer_clip"),
    "clip_g": (transformers.CLIPTextModelWithProjection, "tokenizer_clip_g"),
    "t5": (transformers.T5EncoderModel, "tokenizer_t5"),
}
SCHEDULERS = {
    "dit": diffusers.DDIMScheduler(clip_sample=False),
    "dit_ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "sd": diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD),
    "sd_ddim": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD),
    "sdxl": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD),
    "sd3": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "pixart": diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    "if": diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5, clip_sample=True,
    ),
}  # fmt: skip
NO_CHECKS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
UNET_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
IF_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "act_fn": "gelu",
    "norm_num_groups": 2,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 40,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 4,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter's values: random, moderate, and the same wherever they are made."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        values *= (0.4 if "conv_out" in name else 1.0) * np.prod(shape[1:]) ** -0.5
    else:
        values = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * values
    return values.astype(np.float32)


def filled(net: torch.nn.Module) -> torch.nn.Module:
    """A network with these values."""
    state = {name: torch.from_numpy(fill(name, tuple(t.shape))) for name, t in net.state_dict().items()}
    net.load_state_dict(state)
    return net.eval()


def vae(**settings: object) -> torch.nn.Module:
    """A tiny autoencoder of four channels and half the resolution."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
    }
    return filled(
        diffusers.AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=2, sample_size=16, **settings)
    )


def texts(**names: str) -> dict[str, object]:
    """Text encoders and their tokenizers; `_2="t5"` is text_encoder_2."""
    found = {}
    for number, name in names.items():
        kind, tokenizer = TEXTS[name]
        number = number.removeprefix("one")
        found[f"text_encoder{number}"] = kind.from_pretrained(HERE / "text" / name)
        found[f"tokenizer{number}"] = transformers.AutoTokenizer.from_pretrained(HERE / "text" / tokenizer)
    return found


def dit(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-5,
    )  # fmt: skip
    labels = {str(i): f"class {i}, kind {i}" for i in range(1000)}
    return diffusers.DiTPipeline(filled(net), vae(), SCHEDULERS[kind], labels)


def pixart(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=40, sample_size=8, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=filled(net), vae=vae(), scheduler=SCHEDULERS[kind], **texts(one="t5")
    )


def sd(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, **UNET_BLOCKS
    )
    return diffusers.StableDiffusionPipeline(
        unet=filled(net), vae=vae(), scheduler=SCHEDULERS[kind], **texts(one="clip_l"), **NO_CHECKS
    )


def sdxl(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=32, attention_head_dim=(2, 3), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60, **UNET_BLOCKS,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        unet=filled(net), vae=vae(scaling_factor=0.13), scheduler=SCHEDULERS[kind],
        add_watermarker=False, **texts(one="clip_l", _2="clip_g"),
    )  # fmt: skip


def sd3(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=6,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=filled(net), vae=vae(scaling_factor=1.5, shift_factor=0.06), scheduler=SCHEDULERS[kind],
        **texts(one="clip_lp", _2="clip_g", _3="t5"),
    )  # fmt: skip


def flux(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=40, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(2, 4, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=filled(net), vae=vae(scaling_factor=0.36, shift_factor=0.12), scheduler=SCHEDULERS[kind],
        **texts(one="clip_l", _2="t5"),
    )  # fmt: skip


def deepfloyd(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=6, **IF_BLOCKS)
    return diffusers.IFPipeline(
        unet=filled(net), scheduler=SCHEDULERS["if"], watermarker=None, **texts(one="t5"), **NO_CHECKS
    )


def deepfloyd_sr(kind: str) -> diffusers.DiffusionPipeline:
    net = diffusers.UNet2DConditionModel(
        sample_size=32, in_channels=6, out_channels=6, class_embed_type="timestep", time_embedding_dim=24,
        time_embedding_act_fn="gelu", resnet_skip_time_act=True, resnet_out_scale_factor=1.4142,
        mid_block_scale_factor=1.4142, only_cross_attention=True, **IF_BLOCKS,
    )  # fmt: skip
    return diffusers.IFSuperResolutionPipeline(
        unet=filled(net), scheduler=SCHEDULERS["if"], watermarker=None,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **texts(one="t5"), **NO_CHECKS,
    )  # fmt: skip


# The pipeline, the guidance scale, and what else it is called with.
SIZE = {"height": 16, "width": 16}
PLAIN = {"clean_caption": False}
KINDS = {
    "dit": (dit, 4.0, {}),
    "dit_ddpm": (dit, 4.0, {}),
    "sd": (sd, 7.5, SIZE),
    "sd_ddim": (sd, 7.5, SIZE),
    "sdxl": (sdxl, 5.0, SIZE),
    "sd3": (sd3, 7.0, {**SIZE, "max_sequence_length": 256}),
    "flux": (flux, 3.5, SIZE),
    "pixart": (pixart, 4.5, {**SIZE, **PLAIN, "use_resolution_binning": False}),
    "if": (deepfloyd, 7.0, PLAIN),
    "if_sr": (deepfloyd_sr, 4.0, {**PLAIN, "noise_level": 250}),
}


@contextlib.contextmanager
def recorded(pipe: diffusers.DiffusionPipeline, noises: list[np.ndarray], random: torch.Generator):
    """Notes every noise that the pipeline and its scheduler draw, of the first half of a doubled batch."""

    def draw(shape: tuple[int, ...], *args: object, **kwargs: object) -> torch.Tensor:
        drawn = torch.randn(tuple(shape), generator=random)
        noises.append(drawn[: len(PROMPTS)].numpy())
        return drawn

    with contextlib.ExitStack() as stack:
        for part in (pipe, pipe.scheduler):
            name = f"{type(part).__module__}.randn_tensor"
            stack.enter_context(mock.patch(name, draw, create=True))
        yield


def main(only: list[str]) -> None:
    low_res = None
    for seed, (kind, (make, scale, call)) in enumerate(KINDS.items()):
        if only and kind not in only:
            continue
        pipe = make(kind)
        pipe.set_progress_bar_config(disable=True)
        noises: list[np.ndarray] = []
        random = torch.Generator().manual_seed(seed)
        prompts = {"class_labels": [3, 710]} if kind.startswith("dit") else {"prompt": PROMPTS}
        further = {"image": low_res} if kind == "if_sr" else {}
        settings = {"num_inference_steps": STEPS, "guidance_scale": scale, **call}
        with recorded(pipe, noises, random), torch.no_grad():
            image = pipe(**prompts, **settings, **further, output_type="np").images
        image = np.asarray(image)
        low_res = torch.from_numpy(image).permute(0, 3, 1, 2) * 2.0 - 1.0
        with tempfile.TemporaryDirectory() as folder:
            pipe.save_pretrained(folder)
            paths = sorted(Path(folder).rglob("*.json"))
            names = {path: path.relative_to(folder).as_posix() for path in paths}
            files = {
                names[path]: json.loads(path.read_text()) for path in paths if "token" not in names[path]
            }
        files = {name: text for name, text in files.items() if not name.startswith("text_encoder")}
        nets = {name: getattr(pipe, name, None) for name in ("unet", "transformer", "vae")}
        shapes = {
            part: {name: list(t.shape) for name, t in net.state_dict().items()}
            for part, net in nets.items()
            if net is not None
        }
        np.savez_compressed(
            HERE / f"pipeline_{kind}.npz",
            files=json.dumps(files),
            shapes=json.dumps(shapes),
            call=json.dumps({**prompts, **settings}),
            image=image,
            **{f"noise{i}": noise for i, noise in enumerate(noises)},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
