"""The published sizes of `diffjax.models.unet2d`.

Of DeepFloyd IF, IF-I-XL and IF-II-L are as their config.json says. IF-I-M, IF-I-L and IF-II-M are the same
networks with a first level of 192, 320 and 96 channels, for 0.37, 0.94 and 0.48 billion parameters; their
model cards say 0.4, 0.9 and 0.45 billion and not how wide they are: the checkpoints may differ from these.
"""

from typing import Any


def _sizes() -> dict[str, dict[str, Any]]:
    transformer = ("transformer",) * 3
    sd: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "channels": (320, 640, 1280, 1280),
        "attention": (*transformer, ""),
        "heads": (8, 8, 8, 8),
        "middle_attention": "transformer",
        "text_embed": 768,
    }
    sd2 = sd | {"heads": (5, 10, 20, 20), "text_embed": 1024, "linear_projection": True}
    sdxl = sd2 | {
        "channels": (320, 640, 1280),
        "blocks": (2, 2, 2),
        "attention": ("", "transformer", "transformer"),
        "resample": ("conv", "conv", "conv"),
        "heads": (5, 10, 20),
        "depth": (1, 2, 10),
        "middle_depth": 10,
        "text_embed": 2048,
        "pooled_embed": 2816,
        "size_embed": 256,
    }
    blocks: dict[str, Any] = {"resample": ("block",) * 4, "modulation": "scale_shift"}

    def floyd(width: int, multipliers: tuple[int, ...] = (1, 2, 3, 4), **others: Any) -> dict[str, Any]:
        channels = tuple(width * multiplier for multiplier in multipliers)
        return {
            **blocks,
            "out_channels": 6,
            "channels": channels,
            "blocks": (3, 3, 3, 3),
            "attention": ("", "joint", "joint", "joint"),
            "heads": tuple(max(1, each // 64) for each in channels),
            "middle_attention": "joint",
            "activation": "gelu",
            "text_embed": 4096,
            "context": channels[-1],
            "text_groups": 32,
            "pooling_heads": 64,
            **others,
        }

    def floyd_second(width: int) -> dict[str, Any]:
        sums = 1.4142271248762552  # so in its config.json
        own = {
            "in_channels": 6,
            "blocks": (2, 2, 3, 5, 5),
            "attention": ("", "", "", "joint", "joint"),
            "resample": ("block",) * 5,
            "embed": 8 * width,
            "aug_level": True,
            "divisor": sums,
            "middle_divisor": sums,
            "vector_activation": "gelu",
            "block_activation": "identity",
        }
        return floyd(width, (1, 2, 4, 6, 8), **own)

    def adm(side: int, width: int, multipliers: tuple[int, ...], depth: int = 2) -> dict[str, Any]:
        channels = tuple(width * multiplier for multiplier in multipliers)
        count = len(channels)
        attends = tuple("self" if side >> level in (8, 16, 32) else "" for level in range(count))
        return {
            "in_channels": 3,
            "out_channels": 6,
            "channels": channels,
            "blocks": (depth,) * count,
            "attention": attends,
            "heads": tuple(4 if side == 128 else each // 64 for each in channels),
            "resample": ("block",) * count,
            "modulation": "scale_shift",
            "classes": 1000,
        }

    ddpm = {
        "channels": (128, 256, 256, 256),
        "epsilon": 1e-6,
        "down_padding": 0,
        "sine_first": True,
        "shift": 1,
    }
    return {
        "SD-1.5": sd,
        "SD-2.1": sd2,
        "SDXL": sdxl,
        "IF-I-M": floyd(192),
        "IF-I-L": floyd(320),
        "IF-I-XL": floyd(704),
        "IF-II-M": floyd_second(96),
        "IF-II-L": floyd_second(160),
        "ADM-64": adm(64, 192, (1, 2, 3, 4), 3),
        "ADM-128": adm(128, 256, (1, 1, 2, 3, 4)),
        "ADM-256": adm(256, 256, (1, 1, 2, 2, 4, 4)),
        "ADM-512": adm(512, 128, (1, 2, 2, 4, 4, 8, 8)) | {"embed": 1024, "sinusoids": 256},
        "DDPM-CIFAR10": ddpm,
    }


SIZES = _sizes()
"""Attributes by name: `UNet2D(**SIZES["SD-1.5"])`."""
