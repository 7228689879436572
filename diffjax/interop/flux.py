"""FLUX.1: FluxTransformer2DModel of diffusers.

Its config.json counts channels of packed latents, four for one of the image; our module packs them itself.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.errors import UserError
from diffjax.interop.families import Family, number, require
from diffjax.interop.rows import Row
from diffjax.interop.sd3 import ENDS, example, joint_rows
from diffjax.interop.store import Store
from diffjax.models.flux import Flux

_PATCH = 2


def _build(config: Mapping[str, Any], store: Store) -> Flux:
    require(config, patch_size=1, guidance_embeds=(False, True))
    packed_in = number(config, "in_channels", 64)
    packed_out = number(config, "out_channels", packed_in)
    if packed_in % _PATCH**2 or packed_out % _PATCH**2:
        raise UserError(
            f"config.json: in_channels and out_channels are {packed_in} and {packed_out}; expected multiples "
            f"of {_PATCH**2}, for patches of {_PATCH} x {_PATCH} latents."
        )
    head_dim = number(config, "attention_head_dim", 128)
    given = config.get("axes_dims_rope")
    rope_dims = (16, 56, 56) if given is None else given
    if (
        not isinstance(rope_dims, list | tuple)
        or len(rope_dims) != 3
        or not all(type(width) is int and width > 0 and width % 2 == 0 for width in rope_dims)
        or sum(rope_dims) != head_dim
    ):
        raise UserError(
            f"config.json: axes_dims_rope is {rope_dims!r:.80}; expected three even numbers whose sum is "
            f"attention_head_dim, {head_dim}."
        )
    return Flux(
        depth=number(config, "num_layers", 19),
        single_depth=number(config, "num_single_layers", 38),
        heads=number(config, "num_attention_heads", 24),
        head_dim=head_dim,
        rope_dims=tuple(rope_dims),
        patch=_PATCH,
        in_channels=packed_in // _PATCH**2,
        out_channels=packed_out // _PATCH**2,
        text_embed=number(config, "joint_attention_dim", 4096),
        pooled_embed=number(config, "pooled_projection_dim", 768),
        guidance=bool(config.get("guidance_embeds")),
    )


def _config(module: Flux) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": module.in_channels * module.patch**2,
        "out_channels": module.out_channels * module.patch**2,
        "num_layers": module.depth,
        "num_single_layers": module.single_depth,
        "attention_head_dim": module.head_dim,
        "num_attention_heads": module.heads,
        "joint_attention_dim": module.text_embed,
        "pooled_projection_dim": module.pooled_embed,
        "guidance_embeds": module.guidance,
        "axes_dims_rope": list(module.rope_dims),
    }


def _rows(module: Flux) -> list[Row]:
    rows = [
        Row("x_embedder", "patch_in"),
        *ENDS,
        *joint_rows("transformer_blocks.{i}", "double", qk_norm="rms"),
    ]
    if module.guidance:
        rows += [
            Row(f"time_text_embed.guidance_embedder.linear_{i}", f"vector/guidance/mlp/{layer}")
            for i, layer in ((1, "in"), (2, "out"))
        ]
    single = {"norm.linear": "modulation/dense", "proj_mlp": "mlp", "proj_out": "out"}
    single |= {f"attn.to_{name[0]}": name for name in ("query", "key", "value")}
    rows += [Row(f"single_transformer_blocks.{{i}}.{a}", f"single/{b}") for a, b in single.items()]
    rows += [
        Row(f"single_transformer_blocks.{{i}}.attn.norm_{name[0]}", f"single/{name}_norm", "norm")
        for name in ("query", "key")
    ]
    return rows


FAMILIES = {
    "FluxTransformer2DModel": Family("FluxTransformer2DModel", "diffusers", _build, _config, _rows, example)
}
