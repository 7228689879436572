"""Stable Diffusion, DeepFloyd IF, ADM and DDPM: UNet2DConditionModel and UNet2DModel of diffusers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.interop.families import Family, choice, get, listed, number, numbers, optional, real, require
from diffjax.interop.store import Store
from diffjax.interop.unet2d_layers import kinds_of_types, rows, types_of_kinds
from diffjax.models.unet2d import UNet2D
from diffjax.nn.conditioning import Cond

_MIDDLES: dict[str | None, tuple[int, str]] = {  # residual blocks, and the attention between them
    "UNetMidBlock2DCrossAttn": (2, "transformer"),
    "UNetMidBlock2DSimpleCrossAttn": (2, "joint"),
    "UNetMidBlock2D": (1, ""),
    None: (0, ""),
}
_RESAMPLE = {"conv": "conv", "resnet": "block"}
_MODULATIONS = {"default": "add", "scale_shift": "scale_shift"}
_ACTIVATIONS: dict[str | None, str] = {"silu": "silu", "gelu": "gelu", "relu": "relu", "swish": "silu"}
_VECTOR_ACTIVATIONS = {None: "identity", **_ACTIVATIONS}
_MOST_BLOCKS = 64  # of a level


def _depths(config: Mapping[str, Any], key: str, blocks: Sequence[int]) -> tuple[Any, ...]:
    """Transformer layers of each level; where they are said for its blocks, of each of them."""
    return tuple(
        numbers({key: given}, key, count, None)
        if isinstance(given, list | tuple)
        else number({key: given}, key)
        for given, count in zip(listed(config, key, len(blocks), 1), blocks, strict=True)
    )


def _levels(down: Sequence[str], up: Sequence[str], middle: str) -> list[tuple[str, str, str]]:
    """The attention of each level on the way down, up, and in the middle."""
    return [*zip(down, up or down, ("",) * (len(down) - 1) + (middle,), strict=True)]


def _layered(levels: Sequence[tuple[str, str, str]]) -> list[bool]:
    """Which levels have transformer layers; those without any attention are taken to be like the others."""
    other = any("transformer" in kinds for kinds in levels)
    return ["transformer" in kinds if any(kinds) else other for kinds in levels]


def _short(values: Sequence[Any]) -> Any:
    """One number for all where they are equal."""
    return values[0] if len({*values}) == 1 and isinstance(values[0], int) else [*values]


def _common(
    config: Mapping[str, Any], *, resample: str = "conv", up_resample: str = "conv"
) -> dict[str, Any]:
    """The attributes that networks of both classes have."""
    keys = ("block_out_channels", "down_block_types", "up_block_types")
    lists = [config.get(key) for key in keys]
    channels, down, up = ([*value] if isinstance(value, list | tuple) else [] for value in lists)
    count = len(channels)
    if not 1 <= count <= 16 or len(down) != count or len(up) != count:
        raise UserError(f"config.json: expected {', '.join(keys)}, each of the same 1 to 16 levels.")
    require(config, time_embedding_type="positional", center_input_sample=False)
    require(config, freq_shift=(0, 1), downsample_padding=(0, 1), flip_sin_to_cos=(True, False))
    require(config, class_embed_type=("timestep", "projection"))
    blocks = numbers(config, "layers_per_block", count, 2)
    if max(blocks) > _MOST_BLOCKS:
        raise UserError(f"config.json: layers_per_block is {max(blocks)}; expected up to {_MOST_BLOCKS}.")
    kinds, up_kinds = kinds_of_types(down, "Down", resample), kinds_of_types(up[::-1], "Up", up_resample)
    attention, resampling = zip(*kinds, strict=True)
    up_attention, up_resampling = zip(*up_kinds, strict=True)
    return {
        "channels": numbers(config, "block_out_channels", count, None),
        "blocks": blocks,
        "attention": attention,
        "resample": resampling,
        "up_attention": up_attention if up_attention != attention else (),
        "up_resample": up_resampling if up_resampling != resampling else (),
        "down_padding": int(get(config, "downsample_padding", 1)),
        "middle_divisor": real(config, "mid_block_scale_factor", 1.0),
        "modulation": choice(config, "resnet_time_scale_shift", _MODULATIONS, "default"),
        "activation": choice(config, "act_fn", _ACTIVATIONS, "silu"),
        "groups": number(config, "norm_num_groups", 32),
        "epsilon": real(config, "norm_eps", 1e-5),
        "embed": optional(config, "time_embedding_dim"),
        "sine_first": not get(config, "flip_sin_to_cos", True),
        "shift": int(get(config, "freq_shift", 0)),
        "aug_level": config.get("class_embed_type") == "timestep",
        "classes": 0 if config.get("class_embed_type") else optional(config, "num_class_embeds"),
        "dropout": real(config, "dropout", 0.0),
    }


def _build(config: Mapping[str, Any], store: Store) -> UNet2D:
    """Of a UNet2DModel."""
    require(config, class_embed_type="timestep", act_fn=("silu", "swish"))
    ways = (choice(config, key, _RESAMPLE, "conv") for key in ("downsample_type", "upsample_type"))
    common = _common(config, **dict(zip(("resample", "up_resample"), ways, strict=True)))
    if not {*common["attention"], *common["up_attention"]} <= {"", "self"}:
        raise UserError("config.json: has blocks that attend to text; a UNet2DModel is told none.")
    middles = {"UNetMidBlock2D": (2, "self" if get(config, "add_attention", True) else ""), None: (0, "")}
    middle_blocks, middle = choice(config, "mid_block_type", middles, "UNetMidBlock2D")
    one_head = "attention_head_dim" in config and config["attention_head_dim"] is None
    width = number(config, "attention_head_dim", 8)
    groups = optional(config, "attn_norm_num_groups")
    unsaid = 0 if common["modulation"] == "add" else None
    return UNet2D(
        in_channels=number(config, "in_channels", 3),
        out_channels=number(config, "out_channels", 3),
        heads=tuple(1 if one_head else max(1, channels // width) for channels in common["channels"]),
        middle_blocks=middle_blocks,
        middle_attention=middle,
        # null is no norm where the vector scales and shifts, else as many groups as elsewhere
        middle_groups=None if groups in (unsaid, common["groups"]) else groups,
        **common,
    )


def _build_conditional(config: Mapping[str, Any], store: Store) -> UNet2D:
    """Of a UNet2DConditionModel."""
    require(config, dual_cross_attention=False, attention_type="default", class_embeddings_concat=False)
    require(config, conv_in_kernel=3, conv_out_kernel=3, timestep_post_act=None, num_attention_heads=None)
    require(config, encoder_hid_dim_type="text_proj", cross_attention_norm="group_norm")
    require(config, addition_embed_type=("text", "text_time"))
    common = _common(config)
    blocks, count = common["blocks"], len(common["blocks"])
    middle_blocks, middle = choice(config, "mid_block_type", _MIDDLES, "UNetMidBlock2DCrossAttn")
    levels = _levels(common["attention"], common["up_attention"], middle)

    heads = []
    given = numbers(config, "attention_head_dim", count, 8)
    layered = _layered(levels)
    for width, *values, kinds, many in zip(
        common["channels"], given, given[::-1], given, levels, layered, strict=True
    ):
        # Despite its name it is the number of heads where there are transformer layers. Where there are none,
        # diffusers takes it for the way up in the order of the way down.
        counts = {
            values[0] if many else max(1, width // value)
            for value, kind in zip(values, kinds, strict=True)
            if kind or not any(kinds)
        }
        if len(counts) > 1 or (many and {*kinds} & {"self", "joint"}):
            raise UserError(
                "config.json: attention_head_dim means several numbers of heads at one resolution."
            )
        heads.append(counts.pop())

    # Only these blocks heed the two settings; here all blocks do.
    ways = ("attention", "resample"), ("up_attention", "up_resample")
    blocks_kinds = [
        kind for a, r in ways for kind in zip(common[a], common[r] or common["resample"], strict=False)
    ]
    heeding = {how == "block" and kind != "self" for kind, how in blocks_kinds}
    divisor = real(config, "resnet_out_scale_factor", 1.0) if True in heeding else 1.0
    heeding_skip = heeding | ({middle == "joint"} if middle_blocks else set())
    skip = get(config, "resnet_skip_time_act", False) and True in heeding_skip
    if (divisor != 1.0 and len(heeding) > 1) or (skip and len(heeding_skip) > 1):
        raise UserError("config.json: resnet_out_scale_factor or resnet_skip_time_act hold for a part only.")

    only = get(config, "only_cross_attention", False)
    middle_only = get(config, "mid_block_only_cross_attention", only is True)
    text_only = tuple(value is True for value in listed(config, "only_cross_attention", count, False))
    contexts = {*numbers(config, "cross_attention_dim", count, 1280)}
    if len(contexts) > 1:
        raise UserError(f"config.json: cross_attention_dim is {contexts}; expected one width for all.")
    (context,) = contexts
    projected = optional(config, "encoder_hid_dim")
    added, classed = config.get("addition_embed_type"), config.get("class_embed_type")
    if added == "text_time" and classed == "projection":
        raise UserError("config.json: text_time together with a class_embed_type of projection.")
    pooled = added == "text_time" or classed == "projection"
    every = {kind for kinds in levels for kind in kinds}
    depth = _depths(config, "transformer_layers_per_block", blocks)
    reverse = config.get("reverse_transformer_layers_per_block")
    up_depth = _depths({"reverse": reverse[::-1]}, "reverse", [n + 1 for n in blocks]) if reverse else ()
    return UNet2D(
        in_channels=number(config, "in_channels", 4),
        out_channels=number(config, "out_channels", 4),
        heads=tuple(heads),
        depth=depth,
        up_depth=up_depth,
        text_only=text_only if any(text_only) else (),
        middle_blocks=middle_blocks,
        middle_attention=middle,
        middle_depth=depth[-1] if isinstance(depth[-1], int) else depth[-1][0],
        middle_text_only=middle == "joint" and middle_only is True,
        divisor=divisor,
        vector_activation=choice(config, "time_embedding_act_fn", _VECTOR_ACTIVATIONS, None),
        block_activation="identity" if skip else None,
        pooled_embed=number(config, "projection_class_embeddings_input_dim") if pooled else 0,
        size_embed=number(config, "addition_time_embed_dim") if added == "text_time" else 0,
        guidance_embed=optional(config, "time_cond_proj_dim"),
        text_embed=(projected or context) if every & {"joint", "transformer"} or added == "text" else 0,
        context=context if projected else 0,
        text_groups=32 if config.get("cross_attention_norm") and "joint" in every else 0,
        pooling_heads=number(config, "addition_embed_type_num_heads", 64) if added == "text" else 0,
        linear_projection=get(config, "use_linear_projection", False) is True,
        **common,
    )


def _shared_config(network: UNet2D) -> dict[str, Any]:
    """What the configurations of both classes say."""
    if network.sinusoids not in (0, network.channels[0]):
        raise UserError("diffusers has as many sinusoids as the first level is wide.")
    down, down_type = types_of_kinds(network.attention, network.resample, "Down")
    up_kinds = network.up_attention or network.attention, network.up_resample or network.resample
    up, up_type = types_of_kinds(*up_kinds, "Up")
    modulations = {ours: theirs for theirs, ours in _MODULATIONS.items()}
    return {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": [*network.channels],
        "layers_per_block": _short(network.blocks),
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": down_type,
        "upsample_type": up_type,
        "downsample_padding": network.down_padding,
        "mid_block_scale_factor": network.middle_divisor,
        "resnet_time_scale_shift": modulations[network.modulation],
        "act_fn": network.activation,
        "norm_num_groups": network.groups,
        "norm_eps": network.epsilon,
        "time_embedding_dim": network.embed or None,
        "flip_sin_to_cos": not network.sine_first,
        "freq_shift": network.shift,
        "class_embed_type": "timestep" if network.aug_level else None,
        "num_class_embeds": network.classes or None,
        "dropout": network.dropout,
    }


def _config(network: UNet2D) -> dict[str, Any]:
    """Of a UNet2DModel."""
    levels = _levels(network.attention, network.up_attention, network.middle_attention)
    widths = [
        pair for *pair, kinds in zip(network.channels, network.heads, levels, strict=True) if any(kinds)
    ]
    one_head = all(heads == 1 for _, heads in widths)
    sizes = {None} if one_head else {channels // heads for channels, heads in widths}
    if len(sizes) > 1 or network.text_embed or network.pooled_embed or network.guidance_embed:
        raise UserError("a UNet2DModel has heads of one width, and is told neither text nor guidance.")
    return _shared_config(network) | {
        "mid_block_type": "UNetMidBlock2D" if network.middle_blocks else None,
        "add_attention": bool(network.middle_attention),
        "attention_head_dim": sizes.pop(),
        "attn_norm_num_groups": (
            network.groups if network.middle_groups is None else network.middle_groups or None
        ),
    }


def _config_conditional(network: UNet2D) -> dict[str, Any]:
    """Of a UNet2DConditionModel."""
    shared = _shared_config(network)
    if "resnet" in (shared.pop("downsample_type"), shared.pop("upsample_type")):
        raise UserError("a UNet2DConditionModel with self-attention alone resamples by convolutions.")
    middles = {ours: theirs for theirs, ours in _MIDDLES.items()}
    levels = _levels(network.attention, network.up_attention, network.middle_attention)
    # Where nothing attends no number matters; diffusers takes that of the mirrored level on the way up.
    heads = [
        count if many else width // count if any(kinds) else 0
        for width, count, many, kinds in zip(
            network.channels, network.heads, _layered(levels), levels, strict=True
        )
    ]
    heads = [own or mirrored or max(heads) or 8 for own, mirrored in zip(heads, heads[::-1], strict=True)]
    if heads != heads[::-1] and any({"self", "joint"} & {*kinds} for kinds in levels):
        raise UserError("diffusers has heads of one width in blocks without transformer layers.")
    activations = {ours: theirs for theirs, ours in _VECTOR_ACTIVATIONS.items() if theirs != "swish"}
    added = "text_time" if network.size_embed else "text" if network.pooling_heads else None
    return shared | {
        "mid_block_type": middles[network.middle_blocks, network.middle_attention],
        "attention_head_dim": _short(heads),
        "transformer_layers_per_block": _short(network.depth or (1,)),
        "reverse_transformer_layers_per_block": [*network.up_depth[::-1]] or None,
        "only_cross_attention": _short(network.text_only or (False,)),
        "mid_block_only_cross_attention": network.middle_text_only,
        "resnet_out_scale_factor": network.divisor,
        "resnet_skip_time_act": network.block_activation == "identity",
        "time_embedding_act_fn": activations[network.vector_activation],
        "class_embed_type": shared["class_embed_type"]
        or ("projection" if network.pooled_embed and not network.size_embed else None),
        "addition_embed_type": added,
        "addition_embed_type_num_heads": network.pooling_heads or 64,
        "addition_time_embed_dim": network.size_embed or None,
        "projection_class_embeddings_input_dim": network.pooled_embed or None,
        "time_cond_proj_dim": network.guidance_embed or None,
        "encoder_hid_dim": network.text_embed if network.context else None,
        "encoder_hid_dim_type": "text_proj" if network.context else None,
        "cross_attention_dim": network.context or network.text_embed or 1280,
        "cross_attention_norm": "group_norm" if network.text_groups else None,
        "use_linear_projection": network.linear_projection,
    }


def _example(network: UNet2D) -> tuple[Any, ...]:
    side = 2 ** (len(network.channels) - 1)
    one = jnp.ones(1)
    pooled, sizes = network.pooled_embed, 1 if network.size_embed else 0
    cond = Cond(
        text=jnp.zeros((1, 1, network.text_embed)) if network.text_embed else None,
        pooled=jnp.zeros((1, pooled - sizes * network.size_embed)) if pooled else None,
        aug_level=one,
        label=jnp.zeros(1, jnp.int32),
        size=jnp.zeros((1, sizes)),
        guidance=one,
    )
    return jnp.zeros((1, side, side, network.in_channels)), one, cond


# What the layers of attention over feature maps were called once.
_ALIASES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

FAMILIES = {
    name: Family(name, "diffusers", build, config, rows, _example, aliases=_ALIASES)
    for name, build, config in (
        ("UNet2DModel", _build, _config),
        ("UNet2DConditionModel", _build_conditional, _config_conditional),
    )
}
