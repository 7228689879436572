"""DiT and PixArt-alpha as diffusers writes them, also under the name `Transformer2DModel` of old folders."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.interop.families import Family, fraction, number, require
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.models.dit import DiT
from diffjax.nn.conditioning import Cond

_NORM_TYPES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
_ACTIVATIONS = {
    "gelu-approximate": ("gelu_tanh", False),
    "gelu": ("gelu", False),
    "geglu-approximate": ("quick_gelu", False),
    "linear-silu": ("silu", False),
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
}
_FREE = ("parent", "name", "initializer", "embed_per_block", "dtype", "remat", "scan")  # not theirs to say
_EMBEDDING = "transformer_blocks.{i}.norm1.emb."


def _build(config: Mapping[str, Any], store: Store) -> DiT:
    """Where all blocks embed level and label alike, as in every public checkpoint, there is one embedding."""
    module = _module(config)
    if module.conditioning == "adaln_single":
        return module
    return module.clone(embed_per_block=not _equal(store))


def _module(config: Mapping[str, Any]) -> DiT:
    kind = config.get("norm_type")
    if kind is None:
        kind = {name: kind for kind, name in _NORM_TYPES.items()}.get(str(config.get("_class_name")))
    if kind not in _NORM_TYPES:
        raise UserError(f"config.json: norm_type is {kind!r:.80}; expected {' or '.join(_NORM_TYPES)}.")
    pixart = kind == "ada_norm_single"
    require(
        config,
        _class_name=(_NORM_TYPES[kind], "Transformer2DModel"),
        dropout=0.0,
        attention_type="default",
        norm_elementwise_affine=False,
        only_cross_attention=False,
        double_self_attention=False,
        num_vector_embeds=None,
        activation_fn=tuple(_ACTIVATIONS),
        attention_bias=(True, False),
    )
    heads, patch = number(config, "num_attention_heads", 16), number(config, "patch_size", 2)
    sample_size = number(config, "sample_size", 128 if pixart else 32)
    if sample_size < patch:
        raise UserError(f"config.json: sample_size is {sample_size}; expected at least patch_size, {patch}.")
    activation, gated = _ACTIVATIONS[config.get("activation_fn") or "gelu-approximate"]
    epsilon = fraction(config, "norm_eps", 1e-6 if pixart else 1e-5)
    in_channels = number(config, "in_channels", 4)
    default_out = 8 if pixart and "out_channels" not in config else in_channels
    module = DiT(
        patch=patch,
        embed=heads * number(config, "attention_head_dim", 72),
        depth=number(config, "num_layers", 28),
        heads=heads,
        base_size=sample_size // patch,
        norm_eps=(epsilon if pixart else 1e-6, epsilon),
        qkv_bias=config.get("attention_bias") is not False,
        activation=activation,
        gated=gated,
        in_channels=in_channels,
        out_channels=number(config, "out_channels", default_out),
        time_input="timestep",
    )
    if pixart:
        return module.clone(**_pixart(config, module.embed, sample_size))
    require(
        config,
        cross_attention_dim=None,
        caption_channels=None,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    classes = number(config, "num_embeds_ada_norm", 1000)
    return module.clone(conditioning="adaln_zero", classes=classes, text="", level_shift=1.0)


def _pixart(config: Mapping[str, Any], embed: int, sample_size: int) -> dict[str, Any]:
    """The attributes that PixArt-alpha alone has."""
    if "cross_attention_dim" in config and config["cross_attention_dim"] is None:
        raise UserError("config.json: cross_attention_dim is null, which is not supported; expected a width.")
    context, captions = number(config, "cross_attention_dim", 1152), config.get("caption_channels")
    if captions is not None and context != embed:
        raise UserError(
            f"config.json: cross_attention_dim is {context}; captions are projected to {embed}, "
            "num_attention_heads times attention_head_dim."
        )
    require(config, use_additional_conditions=(True, False))
    sizes = config.get("use_additional_conditions")
    sizes = sample_size == 128 if sizes is None else sizes
    if sizes and embed % 3:
        raise UserError(
            f"config.json: use_additional_conditions needs a width divisible by 3; it is {embed}."
        )
    scale = config.get("interpolation_scale")
    scale = max(sample_size // 64, 1) if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"config.json: interpolation_scale is {scale!r:.80}; expected a positive number.")
    return {
        "conditioning": "adaln_single",
        "text": "tokens" if captions is None else "caption",
        "text_embed": context if captions is None else number(config, "caption_channels"),
        "sizes": sizes,
        "interpolation_scale": float(scale),
    }


def _equal(store: Store) -> bool:
    """Whether the embeddings of all blocks are copies of the first one's."""
    prefix, suffix = _EMBEDDING.split("{i}")
    pattern = re.compile(re.escape(prefix) + r"\d+" + re.escape(suffix))
    there = set(store.names())
    pairs = ((name, pattern.sub(f"{prefix}0{suffix}", name)) for name in there if pattern.match(name))
    return all(
        name == first or first not in there or np.array_equal(store.read(name), store.read(first))
        for name, first in pairs
    )


def _config(module: DiT) -> dict[str, Any]:
    """Refuses a network that these classes have not."""
    for needed in (
        "base_size",
        "in_channels",
        "classes" if module.conditioning == "adaln_zero" else "text_embed",
    ):
        if not getattr(module, needed):
            raise UserError(f"{needed} is 0; a config.json of diffusers must say it.")
    pixart = module.conditioning == "adaln_single"
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    config = {
        "num_attention_heads": module.heads,
        "attention_head_dim": module.embed // module.heads,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "num_layers": module.depth,
        "sample_size": module.base_size * module.patch,
        "patch_size": module.patch,
        "attention_bias": module.qkv_bias,
        "activation_fn": names.get((module.activation, module.gated), module.activation),
        "norm_type": "ada_norm_single" if pixart else "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": module.norm_eps[1],
        "num_embeds_ada_norm": 1000 if pixart else module.classes,
    }
    if pixart:
        config |= {
            "cross_attention_dim": module.embed if module.text == "caption" else module.text_embed,
            "caption_channels": module.text_embed if module.text == "caption" else None,
            "use_additional_conditions": module.sizes,
            "interpolation_scale": module.interpolation_scale,
        }
    again = _module(config)
    for field in dataclasses.fields(DiT):
        mine, theirs = getattr(module, field.name), getattr(again, field.name)
        if field.name not in _FREE and mine != theirs:
            kind = _NORM_TYPES[str(config["norm_type"])]
            raise UserError(f"{field.name} is {mine!r:.80}; in a {kind} of diffusers it is {theirs!r:.80}.")
    return config


def _rows(module: DiT) -> list[Row]:
    block, pixart = "transformer_blocks.{i}.", module.conditioning == "adaln_single"
    _config(module)  # refuses what diffusers has not
    rows = [Row("pos_embed.proj", "patch_in", "patch", window=module.patch)]
    rows += _attention(f"{block}attn1.", "blocks/attention/")
    if module.gated:
        rows += [
            Row(f"{block}ff.net.0.proj", f"blocks/mlp/{name}", chunk=(i, 2))
            for i, name in enumerate(("in", "gate"))
        ]
    else:
        rows += [Row(f"{block}ff.net.0.proj", "blocks/mlp/in")]
    rows += [Row(f"{block}ff.net.2", "blocks/mlp/out")]
    if not pixart:
        equal = 0 if module.embed_per_block else module.depth
        return [
            *rows,
            *_layers(f"{_EMBEDDING}timestep_embedder", "embedding/level/mlp", equal),
            Row(f"{_EMBEDDING}class_embedder.embedding_table", "embedding/label/table", "embed", equal=equal),
            Row(f"{block}norm1.linear", "blocks/modulation/dense"),
            Row("proj_out_1", "final_modulation/dense"),
            Row("proj_out_2", "patch_out"),
        ]
    rows += [
        *_layers("adaln_single.emb.timestep_embedder", "embedding/level/mlp"),
        Row("adaln_single.linear", "modulation/dense"),
        *_attention(f"{block}attn2.", "blocks/cross_attention/"),
        Row(f"{block}scale_shift_table", "blocks/modulation/table", "raw"),
        Row("scale_shift_table", "final_modulation/table", "raw"),
        Row("proj_out", "patch_out"),
    ]
    if module.text == "caption":
        rows += _layers("caption_projection", "text")
    if module.sizes:
        for name in ("resolution", "aspect_ratio"):
            rows += _layers(f"adaln_single.emb.{name}_embedder", f"{name}/mlp")
    return rows


def _layers(theirs: str, ours: str, equal: int = 0) -> list[Row]:
    names = (("linear_1", "in"), ("linear_2", "out"))
    return [Row(f"{theirs}.{their}", f"{ours}/{our}", equal=equal) for their, our in names]


def _attention(theirs: str, ours: str) -> list[Row]:
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out"))
    return [Row(theirs + their, ours + our) for their, our in names]


def _example(module: DiT) -> tuple[Any, ...]:
    cond = Cond(
        label=jnp.zeros(1, jnp.int32), text=jnp.zeros((1, 1, module.text_embed)), size=jnp.ones((1, 6))
    )
    return jnp.zeros((1, module.patch, module.patch, module.in_channels)), jnp.zeros(1), cond


FAMILIES = {
    name: Family(
        name,
        "diffusers",
        _build,
        _config,
        _rows,
        _example,
        # Tables that follow from the configuration, or that no code uses.
        ignored=("pos_embed.pos_embed", "caption_projection.y_embedding"),
    )
    for name in (*_NORM_TYPES.values(), "Transformer2DModel")
}
