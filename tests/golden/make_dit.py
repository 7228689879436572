"""Makes dit_*.{json,safetensors,npz}: DiT and PixArt-alpha of diffusers, all parameters random.

Run in an environment with torch (CPU), diffusers and safetensors: `python tests/golden/make_dit.py`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
WIDTH = {"num_attention_heads": 2, "num_layers": 2, "patch_size": 2, "in_channels": 4}
CASES = {
    # As published: one embedding for all blocks, learned variance; not at the size of the configuration.
    "dit_shared": (
        DiTTransformer2DModel,
        {"attention_head_dim": 8, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 5},
        (12, 12),
    ),
    # Embeddings of each block, a gated MLP, a norm whose epsilon is felt.
    "dit_apart": (
        DiTTransformer2DModel,
        {
            "attention_head_dim": 8,
            "sample_size": 8,
            "num_embeds_ada_norm": 5,
            "attention_bias": False,
            "activation_fn": "geglu",
            "norm_eps": 0.1,
        },
        (8, 8),
    ),
    # As at 1024 pixels: with sizes and wider positions; not square.
    "dit_pixart": (
        PixArtTransformer2DModel,
        {
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 20,
            "sample_size": 8,
            "interpolation_scale": 2,
            "use_additional_conditions": True,
        },
        (8, 12),
    ),
    # Tokens as they come.
    "dit_pixart_plain": (
        PixArtTransformer2DModel,
        {
            "attention_head_dim": 8,
            "cross_attention_dim": 20,
            "sample_size": 132,
            "out_channels": None,
            "norm_eps": 0.1,
        },
        (6, 4),
    ),
}


def main() -> None:
    for seed, (name, (kind, settings, (height, width))) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        net = kind(**WIDTH, **settings).eval()
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.data = torch.randn(parameter.shape, generator=random) * fan_in**-0.5
        if name == "dit_shared":
            first = net.transformer_blocks[0].norm1.emb.state_dict()
            net.transformer_blocks[1].norm1.emb.load_state_dict(first)

        x = torch.randn(3, 4, height, width, generator=random, requires_grad=True)
        arrays = {"x": x, "level": torch.tensor([0.0, 37.0, 999.0])}
        if kind is DiTTransformer2DModel:
            arrays["label"] = torch.tensor([2, 0, 5])  # the last is none of the five classes
            y = net(x, arrays["level"], arrays["label"]).sample
        else:
            arrays["text"] = torch.randn(3, 4, 20, generator=random)
            more = {}
            if net.use_additional_conditions:
                size = torch.tensor([[512.0, 768.0], [1024.0, 1024.0], [96.0, 64.0]])
                arrays["size"] = size
                arrays["mask"] = torch.tensor(
                    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
                )
                more["added_cond_kwargs"] = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
                more["encoder_attention_mask"] = arrays["mask"]
            y = net(x, arrays["text"], arrays["level"], **more).sample
        arrays["y"] = y
        if name in ("dit_shared", "dit_pixart"):
            arrays["cotangent"] = torch.randn(y.shape, generator=random)
            (y * arrays["cotangent"]).sum().backward()
            arrays["grad_x"] = x.grad
            arrays |= {f"grad:{key}": parameter.grad for key, parameter in net.named_parameters()}

        np.savez_compressed(
            HERE / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
        )
        save_file(net.state_dict(), HERE / f"{name}.safetensors", {"format": "pt"})
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        text = json.dumps({"_class_name": kind.__name__, **config}, indent=1)
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
