"""Make the golden cases of SD3, SD3.5 and FLUX.1 with diffusers: tiny networks whose every tensor is random.

Writes next to this file, for each of `CASES`, `NAME.json` (the config.json), `NAME.safetensors`, and
`NAME.npz` with inputs and outputs, channels first, and for some the gradients of `sum(output * cotangent)`.

In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 safetensors numpy
    python tests/golden/make_mmdit.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 9,
    "dual_attention_layers": [],
    "qk_norm": None,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 14,
    "pooled_projection_dim": 10,
    "guidance_embeds": False,
    "axes_dims_rope": [2, 4, 6],
}
CASES = {  # class, configuration, height and width of the images, tensors whose gradients are wanted
    "sd3": (SD3Transformer2DModel, SD3, (12, 8), []),
    "sd35": (
        SD3Transformer2DModel,
        SD3 | {"num_layers": 4, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm", "out_channels": 6},
        (8, 14),
        [
            "pos_embed.proj.weight",
            "context_embedder.weight",
            "time_text_embed.timestep_embedder.linear_1.weight",
            "transformer_blocks.1.norm1.linear.weight",
            "transformer_blocks.1.attn2.to_q.weight",
            "transformer_blocks.2.attn.norm_added_k.weight",
            "transformer_blocks.3.norm1_context.linear.bias",
        ],
    ),
    "flux_schnell": (FluxTransformer2DModel, FLUX | {"num_layers": 1}, (6, 8), []),
    "flux_dev": (
        FluxTransformer2DModel,
        FLUX | {"guidance_embeds": True, "in_channels": 24, "out_channels": 16},
        (8, 6),
        [
            "x_embedder.weight",
            "time_text_embed.guidance_embedder.linear_1.weight",
            "transformer_blocks.1.attn.norm_added_k.weight",
            "transformer_blocks.0.ff_context.net.2.weight",
            "single_transformer_blocks.1.proj_out.weight",
            "norm_out.linear.weight",
        ],
    ),
}


def randomise(model: torch.nn.Module) -> None:
    """Random numbers in every parameter and buffer, such that activations stay moderate."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 or name == "pos_embed.pos_embed":
                tensor.normal_(float(".norm_" in name and name.endswith("weight")), 0.3)
            else:
                tensor.normal_(0.0, 1.3 * (tensor.numel() / tensor.shape[0]) ** -0.5)


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The prediction for latents that are not packed, as the pipelines obtain it."""
    x, text, pooled = inputs["x"], inputs["text"], inputs["pooled"]
    if isinstance(model, SD3Transformer2DModel):
        return model(x, text, pooled, inputs["level"]).sample
    batch, channels, height, width = x.shape
    packed = FluxPipeline._pack_latents(x, batch, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    out = model(
        packed,
        text,
        pooled,
        inputs["level"] / 1000,
        ids,
        torch.zeros(text.shape[1], 3),
        inputs.get("guidance"),
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


def make(name: str, seed: int) -> None:
    """Write one case."""
    cls, config, (height, width), wanted = CASES[name]
    torch.manual_seed(seed)
    model = cls(**config).eval()
    fresh = {"fresh_positions": model.pos_embed.pos_embed.clone()} if name == "sd3" else {}
    randomise(model)
    channels = config["in_channels"] // (1 if cls is SD3Transformer2DModel else 4)
    inputs = {
        "x": torch.randn(2, channels, height, width),
        "level": torch.tensor([371.5, 902.0]),
        "text": torch.randn(2, 5, config["joint_attention_dim"]),
        "pooled": torch.randn(2, config["pooled_projection_dim"]),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5, 1.25])
    inputs["x"].requires_grad_(bool(wanted))
    y = run(model, inputs)
    arrays = {**inputs, **fresh, "y": y}
    if wanted:
        arrays["cotangent"] = torch.randn_like(y)
        (y * arrays["cotangent"]).sum().backward()
        arrays["gradient/x"] = inputs["x"].grad
        parameters = dict(model.named_parameters())
        arrays |= {f"gradient/{key}": parameters[key].grad for key in wanted}
    text = json.dumps({"_class_name": cls.__name__, **config}, indent=1)
    (HERE / f"{name}.json").write_text(text + "\n")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / f"{name}.safetensors")
    np.savez_compressed(HERE / f"{name}.npz", **{k: v.detach().numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    for seed, name in enumerate(CASES):
        make(name, seed)
