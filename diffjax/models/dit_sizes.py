"""The published sizes of diffusion transformers.

DiT (Peebles and Xie, 2023) and PixArt-alpha (Chen et al., 2023; by the side of the image in pixels) denoise
latents of 4 channels and learn the variance; JiT (Li and He, 2025) predicts the pixels of the image itself.
"""

from typing import Any


def _sizes() -> dict[str, dict[str, Any]]:
    widths = {
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
        "H": (1280, 32, 16),
    }

    def size(name: str, patch: int, **others: Any) -> dict[str, Any]:
        embed, depth, heads = widths[name]
        widths_of = {"patch": patch, "embed": embed, "depth": depth, "heads": heads}
        return {**widths_of, "time_input": "timestep", "initializer": "xavier", "text": "", **others}

    latents: dict[str, Any] = {"in_channels": 4, "out_channels": 8}
    sizes = {
        f"DiT-{name}/{patch}": size(name, patch, classes=1000, **latents)
        for name in ("S", "B", "L", "XL")
        for patch in (2, 4, 8)
    }
    jit: dict[str, Any] = {
        "classes": 1000,
        "positions": "sincos+rotary",
        "norm": "rms",
        "qk_norm": "rms",
        "activation": "silu",
        "gated": True,
        "mlp_ratio": 8 / 3,
        "class_tokens": 32,
        "in_channels": 3,
    }
    for name, bottleneck, start in (("B", 128, 4), ("L", 128, 8), ("H", 256, 10)):
        for patch in (16, 32):
            own = {"bottleneck": bottleneck, "class_tokens_from": start}
            sizes[f"JiT-{name}/{patch}"] = size(name, patch, **jit, **own)
    pixart: dict[str, Any] = {
        **latents,
        "conditioning": "adaln_single",
        "text": "caption",
        "text_embed": 4096,
    }
    for pixels, scale in ((256, 1.0), (512, 1.0), (1024, 2.0)):
        of_size: dict[str, Any] = {
            "base_size": pixels // 16,
            "interpolation_scale": scale,
            "sizes": pixels == 1024,
        }
        sizes[f"PixArt-alpha-XL/2-{pixels}"] = size("XL", 2, **pixart, **of_size)
    return sizes


SIZES = _sizes()
"""Attributes by name: `DiT(**SIZES["DiT-XL/2"])`."""
