"""The autoencoder of Stable Diffusion, SDXL, SD3 and FLUX: AutoencoderKL of diffusers."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.interop.families import Family, number, require
from diffjax.interop.model import Network
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.models.autoencoder import Autoencoder

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def build(config: Mapping[str, Any], store: Store) -> Autoencoder:
    """The module of a config.json."""
    channels = config.get("block_out_channels", [64])
    if not isinstance(channels, list) or not 1 <= len(channels) <= 16:
        raise UserError(
            f"config.json: block_out_channels is {channels!r:.80}; expected a width for each level."
        )
    channels = tuple(number({"block_out_channels": width}, "block_out_channels") for width in channels)
    for key, kind in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        require({key: config.get(key, [kind])}, **{key: [kind] * len(channels)})
    latent_channels = number(config, "latent_channels", 4)
    mean, std = (_factors(config, key, latent_channels) for key in ("latents_mean", "latents_std"))
    if bool(mean) != bool(std) or (mean and config.get("shift_factor") is not None):
        raise UserError(
            "config.json: expected latents_mean and latents_std together, and no shift_factor then."
        )
    out_channels = number(config, "out_channels", 3)
    require(config, act_fn=("silu", "swish"), in_channels=out_channels)
    return Autoencoder(
        latent_channels=latent_channels,
        channels=channels,
        blocks=number(config, "layers_per_block", 1),
        groups=number(config, "norm_num_groups", 32),
        attention=_flag(config, "mid_block_add_attention"),
        project_moments=_flag(config, "use_quant_conv"),
        project_latents=_flag(config, "use_post_quant_conv"),
        scaling_factor=_real(config, "scaling_factor", 0.18215, divisor=True),
        shift_factor=_real(config, "shift_factor", 0.0),
        latents_mean=mean,
        latents_std=std,
        sample_size=number(config, "sample_size", 32),
        out_channels=out_channels,
    )


def config(module: Autoencoder) -> dict[str, Any]:
    """What diffusers' config.json says of it."""
    return {
        "in_channels": module.out_channels,
        "out_channels": module.out_channels,
        "down_block_types": [_DOWN] * len(module.channels),
        "up_block_types": [_UP] * len(module.channels),
        "block_out_channels": list(module.channels),
        "layers_per_block": module.blocks,
        "act_fn": "silu",
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.groups,
        "sample_size": module.sample_size,
        "scaling_factor": module.scaling_factor,
        "shift_factor": module.shift_factor or None,
        "latents_mean": list(module.latents_mean) or None,
        "latents_std": list(module.latents_std) or None,
        "use_quant_conv": module.project_moments,
        "use_post_quant_conv": module.project_latents,
        "mid_block_add_attention": module.attention,
    }


def rows(module: Autoencoder) -> list[Row]:
    """The table of its layers."""
    last = len(module.channels) - 1
    table = [
        *_trunk(module, "encoder", "down_blocks", range(last + 1), "down", module.blocks),
        *_trunk(module, "decoder", "up_blocks", range(last, -1, -1), "up", module.blocks + 1),
    ]
    for i in range(last):
        theirs = f"coder.{{}}_blocks.{i}.{{}}samplers.0.conv"
        table.append(Row("en" + theirs.format("down", "down"), f"encoder/down_{i}/conv", "conv"))
        table.append(Row("de" + theirs.format("up", "up"), f"decoder/up_{last - i}/conv", "conv"))
    if module.project_moments:
        table.append(Row("quant_conv", "encoder/moments", "conv"))
    if module.project_latents:
        table.append(Row("post_quant_conv", "decoder/latents", "conv"))
    return table


def decoder_only(network: Network) -> Network:
    """The same network, of which only the decoder is read: all that sampling needs.

    Args:
      network: an autoencoder, opened and not read.

    Returns:
      a network whose parameters are `{"decoder": ...}`.
    """
    table = [row for row in network.family.rows(network.module) if row.ours.startswith("decoder/")]
    family = network.family._replace(rows=lambda module: table, ignored=("encoder.", "quant_conv."))
    shapes, axes = ({"decoder": tree["decoder"]} for tree in (network.shapes, network.axes))
    return network._replace(family=family, shapes=shapes, axes=axes)


def _trunk(module: Autoencoder, half: str, theirs: str, levels: range, ours: str, blocks: int) -> list[Row]:
    """The rows of one half; `levels` are those of its blocks, in the order in which it has them."""
    table = [
        Row(f"{half}.conv_in", f"{half}/in", "conv"),
        Row(f"{half}.conv_norm_out", f"{half}/norm_out", "norm"),
        Row(f"{half}.conv_out", f"{half}/out", "conv"),
        *_res_block(f"{half}.mid_block.resnets.0", f"{half}/middle_0"),
        *_res_block(f"{half}.mid_block.resnets.1", f"{half}/middle_1"),
    ]
    if module.attention:
        attention, block = f"{half}.mid_block.attentions.0", f"{half}/middle_attention"
        table.append(Row(f"{attention}.group_norm", f"{block}/self_norm", "norm"))
        for there, here in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
            table.append(Row(f"{attention}.{there}", f"{block}/self_attention/{here}"))
    before = module.channels[levels[0]]
    for i, level in enumerate(levels):
        block, width = f"{half}.{theirs}.{i}.resnets", module.channels[level]
        table += _res_block(f"{block}.0", f"{half}/{ours}_{level}_first")
        if width != before:
            table.append(Row(f"{block}.0.conv_shortcut", f"{half}/{ours}_{level}_first/skip", "conv"))
        if blocks > 1:
            table += _res_block(f"{block}.{{i}}", f"{half}/{ours}_{level}_rest", first=1)
        before = width
    return table


def _res_block(theirs: str, ours: str, first: int = 0) -> list[Row]:
    layers = (("norm1", "norm_in"), ("conv1", "conv_in"), ("norm2", "norm_out"), ("conv2", "conv_out"))
    return [Row(f"{theirs}.{there}", f"{ours}/{here}", there[:4], first=first) for there, here in layers]


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r:.80}; expected true or false.")
    return value is not False


def _real(config: Mapping[str, Any], key: str, default: float, *, divisor: bool = False) -> float:
    value = config.get(key)
    value = default if value is None else value
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or (divisor and not value)
    ):
        expected = "a finite number, not 0" if divisor else "a finite number"
        raise UserError(f"config.json: {key} is {value!r:.80}; expected {expected}.")
    return float(value)


def _factors(config: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    values = config.get(key)
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) != count:
        raise UserError(f"config.json: {key} is {values!r:.80}; expected {count} numbers, one a channel.")
    return tuple(_real({key: value}, key, 0.0, divisor=key == "latents_std") for value in values)


AUTOENCODER_KL = Family(
    name="AutoencoderKL",
    library="diffusers",
    build=build,
    config=config,
    rows=rows,
    example=lambda module: (jnp.zeros((1, module.stride(), module.stride(), module.out_channels)),),
    # Stable Diffusion 1 and 2 have the names of before diffusers 0.15.
    aliases={".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."},
)
FAMILIES = {AUTOENCODER_KL.name: AUTOENCODER_KL}
