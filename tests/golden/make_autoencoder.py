"""Makes autoencoder_*.{json,safetensors,npz}: AutoencoderKL of diffusers, all parameters random.

Run in an environment with torch (CPU), diffusers and safetensors: `python tests/golden/make_autoencoder.py`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

HERE = Path(__file__).parent
CASES = {
    # Four channels, two levels, as Stable Diffusion.
    "four": {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "sample_size": 16},
    # Sixteen channels and no projections, as SD3 and FLUX; three levels with stacks of several blocks.
    "sixteen": {
        "block_out_channels": (4, 8, 8),
        "layers_per_block": 3,
        "latent_channels": 16,
        "sample_size": 32,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    # No attention, one block a level, factors by channel.
    "plain": {
        "block_out_channels": (4, 4),
        "layers_per_block": 1,
        "latent_channels": 2,
        "sample_size": 16,
        "mid_block_add_attention": False,
        "use_post_quant_conv": False,
        "latents_mean": [0.5, -1.0],
        "latents_std": [2.0, 3.0],
    },
}


def tiled(net: AutoencoderKL, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Images and latents larger than a tile, and what the original makes of them."""
    wide = torch.randn(1, 3, 40, 56, generator=random)
    deep = torch.randn(1, 4, 18, 26, generator=random)
    net.enable_tiling()
    with torch.no_grad():
        posterior = net.encode(wide).latent_dist
        moments = {"tiled_mean": posterior.mean, "tiled_logvar": posterior.logvar}
        return {"wide": wide, "deep": deep, "tiled_images": net.decode(deep).sample, **moments}


def main() -> None:
    for seed, (name, settings) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        levels = len(settings["block_out_channels"])
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        net = AutoencoderKL(**blocks, **settings, norm_num_groups=2).eval()
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.data = torch.randn(parameter.shape, generator=random) * fan_in**-0.5
        latent = 24 // 2 ** (levels - 1)
        x = torch.randn(2, 3, 24, 20, generator=random, requires_grad=True)
        z = torch.randn(
            2, settings["latent_channels"], latent, latent - 2, generator=random, requires_grad=True
        )
        posterior = net.encode(x).latent_dist
        images = net.decode(z).sample
        arrays = {"x": x, "z": z, "mean": posterior.mean, "logvar": posterior.logvar, "kl": posterior.kl()}
        arrays |= {"images": images}

        cotangents = {"mean": posterior.mean, "logvar": posterior.logvar, "images": images}
        loss = 0.0
        for key, value in cotangents.items():
            arrays[f"cotangent_{key}"] = torch.randn(value.shape, generator=random)
            loss = loss + (value * arrays[f"cotangent_{key}"]).sum()
        loss.backward()
        arrays |= {"grad_x": x.grad, "grad_z": z.grad}
        for key in (
            "encoder.conv_in.weight",
            "encoder.down_blocks.1.resnets.0.conv1.weight",
            "encoder.mid_block.resnets.1.norm2.weight",
            "decoder.conv_in.bias",
            "decoder.up_blocks.1.resnets.1.conv2.weight",
        ):
            arrays[f"grad:{key}"] = net.get_parameter(key).grad

        if name == "four":
            arrays |= tiled(net, random)
        np.savez_compressed(
            HERE / f"autoencoder_{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
        )
        save_file(net.state_dict(), HERE / f"autoencoder_{name}.safetensors", {"format": "pt"})
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        text = json.dumps({"_class_name": "AutoencoderKL", **config}, indent=1)
        (HERE / f"autoencoder_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
