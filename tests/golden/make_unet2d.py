"""Make the golden cases of the U-Nets of diffusers: tiny networks whose every tensor is random.

Writes next to this file, for each of `CASES`, `unet2d_NAME.json` (its config.json), `unet2d_NAME.safetensors`
and `unet2d_NAME.npz` with inputs and outputs, channels first, and for some the gradients of
`sum(output * cotangent)`.

In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 safetensors numpy
    python tests/golden/make_unet2d.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
SD = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 12],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
IF = {
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "act_fn": "gelu",
    "norm_num_groups": 2,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 12,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 4,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 3,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}
CASES: dict[
    str, tuple[type, dict[str, Any], list[str]]
] = {  # class, config, tensors whose gradients are wanted
    "sd": (
        UNet2DConditionModel,
        SD,
        [
            "conv_in.weight",
            "time_embedding.linear_1.weight",
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "down_blocks.0.downsamplers.0.conv.weight",
            "mid_block.attentions.0.norm.weight",
            "up_blocks.0.upsamplers.0.conv.bias",
            "up_blocks.1.resnets.1.conv_shortcut.weight",
        ],
    ),
    "sdxl": (
        UNet2DConditionModel,
        SD
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 34,
            "time_cond_proj_dim": 6,
            "num_class_embeds": 5,
        },
        [],
    ),
    "if_first": (UNet2DConditionModel, IF, []),
    "if_second": (
        UNet2DConditionModel,
        IF
        | {
            "in_channels": 6,
            "layers_per_block": [1, 2],
            "class_embed_type": "timestep",
            "time_embedding_dim": 24,
            "time_embedding_act_fn": "gelu",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.4142,
            "mid_block_scale_factor": 1.25,
            "only_cross_attention": True,
        },
        [
            "encoder_hid_proj.weight",
            "class_embedding.linear_1.weight",
            "add_embedding.pool.positional_embedding",
            "down_blocks.0.downsamplers.0.time_emb_proj.weight",
            "down_blocks.1.attentions.1.norm_cross.weight",
            "mid_block.attentions.0.add_k_proj.weight",
            "up_blocks.0.resnets.2.norm1.weight",
        ],
    ),
    "adm": (
        UNet2DModel,
        {
            "in_channels": 3,
            "out_channels": 6,
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "block_out_channels": [4, 8],
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 2,
            "attn_norm_num_groups": 4,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 7,
        },
        [
            "class_embedding.weight",
            "down_blocks.0.downsamplers.0.norm2.weight",
            "down_blocks.1.attentions.0.to_q.weight",
            "mid_block.attentions.0.group_norm.weight",
            "up_blocks.0.attentions.1.to_out.0.weight",
            "up_blocks.1.resnets.0.conv_shortcut.weight",
        ],
    ),
    "ddpm": (
        UNet2DModel,
        {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 12, 8],
            "layers_per_block": 1,
            "attention_head_dim": None,
            "norm_num_groups": 4,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        [],
    ),
}


def randomise(model: torch.nn.Module) -> None:
    """Random numbers in every parameter, such that activations stay moderate."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.normal_(float("norm" in name and name.endswith("weight")), 0.3)
            else:
                tensor.normal_(0.0, 1.3 * (tensor.numel() / tensor.shape[0]) ** -0.5)


def inputs_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a network of this configuration is told, by the names of `Cond`."""
    inputs = {"x": torch.randn(2, config["in_channels"], 8, 12), "level": torch.tensor([37.0, 902.0])}
    if "cross_attention_dim" in config:
        inputs["text"] = torch.randn(2, 5, config.get("encoder_hid_dim") or config["cross_attention_dim"])
    if config.get("class_embed_type") == "timestep":
        inputs["aug_level"] = torch.tensor([250.0, 3.0])
    elif config.get("num_class_embeds"):
        inputs["label"] = torch.tensor([0, config["num_class_embeds"] - 1])
    if config.get("addition_embed_type") == "text_time":
        inputs["size"] = torch.tensor([[512.0, 640, 0, 32, 768, 768], [64, 80, 3, 0, 512, 1024]])
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["pooled"] = torch.randn(2, width)
    if config.get("time_cond_proj_dim"):
        inputs["guidance"] = torch.tensor([7.5, 1.5])
    return inputs


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The prediction, as the pipelines obtain it."""
    labels = inputs.get("label", inputs.get("aug_level"))
    if isinstance(model, UNet2DModel):
        return model(inputs["x"], inputs["level"], labels).sample
    others: dict[str, Any] = {"class_labels": labels}
    if "size" in inputs:
        others["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": inputs["size"]}
    if "guidance" in inputs:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        dim = model.config.time_cond_proj_dim
        others["timestep_cond"] = embed(None, inputs["guidance"] - 1, embedding_dim=dim)
    return model(inputs["x"], inputs["level"], inputs["text"], **others).sample


def make(name: str, cls: type, config: dict[str, Any], wanted: list[str], folder: Path = HERE) -> None:
    """Write one case."""
    torch.manual_seed(0)
    model = cls(**config).eval()
    randomise(model)
    inputs = inputs_of(config)
    inputs["x"].requires_grad_(bool(wanted))
    y = run(model, inputs)
    arrays = {**inputs, "y": y}
    if wanted:
        arrays["cotangent"] = torch.randn_like(y)
        (y * arrays["cotangent"]).sum().backward()
        arrays["gradient/x"] = inputs["x"].grad
        parameters = dict(model.named_parameters())
        arrays |= {f"gradient/{key}": parameters[key].grad for key in wanted}
    text = json.dumps({"_class_name": cls.__name__, **config}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
    np.savez_compressed(folder / f"{name}.npz", **{k: v.detach().numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    for name, case in CASES.items():
        make(f"unet2d_{name}", *case)
