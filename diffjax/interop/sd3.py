"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel of diffusers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.interop.families import Family, number
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.models.mmdit import MMDiT, stacks
from diffjax.nn.conditioning import Cond

_NORMS = {None: "", "rms_norm": "rms", "layer_norm": "layer"}


def joint_rows(
    theirs: str, ours: str, *, first: int = 0, qk_norm: str = "", dual: bool = False, last: bool = False
) -> list[Row]:
    """The table of a stack of `diffjax.nn.joint.JointBlock`.

    Args:
      theirs: what their names begin with, with "{i}" for the number of the block.
      ours: the path of the stack.
      first: the number of the first block.
      qk_norm: as the block has it.
      dual: as the block has it.
      last: as the block has it.
    """
    layers = {
        "norm1.linear": "modulation/dense",
        "ff.net.0.proj": "mlp/in",
        "ff.net.2": "mlp/out",
        "attn.to_out.0": "attention/out",
        **{f"attn.to_{name[0]}": f"attention/{name}" for name in ("query", "key", "value")},
        **{f"attn.add_{name[0]}_proj": f"attention/context_{name}" for name in ("query", "key", "value")},
    }
    if not last:
        layers |= {
            "norm1_context.linear": "context_modulation/dense",
            "ff_context.net.0.proj": "context_mlp/in",
            "ff_context.net.2": "context_mlp/out",
            "attn.to_add_out": "attention/context_out",
        }
    norms = {}
    if qk_norm:
        norms = {f"attn.norm_{name[0]}": f"attention/{name}_norm" for name in ("query", "key")}
        norms |= {f"attn.norm_added_{name[0]}": f"attention/context_{name}_norm" for name in ("query", "key")}
    if dual:
        layers["attn2.to_out.0"] = "dual_attention/out"
        layers |= {f"attn2.to_{name[0]}": f"dual_attention/{name}" for name in ("query", "key", "value")}
        if qk_norm:
            norms |= {f"attn2.norm_{name[0]}": f"dual_attention/{name}_norm" for name in ("query", "key")}
    rows = [Row(f"{theirs}.{a}", f"{ours}/{b}", first=first) for a, b in layers.items()]
    rows += [Row(f"{theirs}.{a}", f"{ours}/{b}", "norm", first=first) for a, b in norms.items()]
    if last:  # its scale stands before its shift
        layer = f"{theirs}.norm1_context.linear", f"{ours}/context_modulation/dense"
        rows.append(Row(*layer, order=(1, 0), first=first))
    return rows


ENDS = [
    Row("context_embedder", "context_in"),
    *(
        Row(f"time_text_embed.{theirs}.linear_{i}", f"vector/{ours}/{layer}")
        for theirs, ours in (("timestep_embedder", "noise_level/mlp"), ("text_embedder", "pooled"))
        for i, layer in ((1, "in"), (2, "out"))
    ),
    Row("norm_out.linear", "out/modulation/dense", order=(1, 0)),
    Row("proj_out", "out/dense"),
]
"""What comes before and after the blocks, here and in FLUX."""


def _build(config: Mapping[str, Any], store: Store) -> MMDiT:
    heads, head_dim = number(config, "num_attention_heads", 18), number(config, "attention_head_dim", 64)
    depth, in_channels = number(config, "num_layers", 18), number(config, "in_channels", 16)
    width = number(config, "caption_projection_dim", 1152)
    if width != heads * head_dim:
        raise UserError(
            f"config.json: caption_projection_dim is {width}; expected num_attention_heads times "
            f"attention_head_dim, {heads * head_dim}."
        )
    if "pos_embed_max_size" in config and not config["pos_embed_max_size"]:
        raise UserError("config.json: pos_embed_max_size is null, which is not supported; expected a size.")
    dual = config.get("dual_attention_layers") or ()
    if not isinstance(dual, list | tuple) or not all(type(i) is int and 0 <= i < depth for i in dual):
        raise UserError(f"config.json: dual_attention_layers is {dual!r:.80}; expected numbers of blocks.")
    if config.get("qk_norm") not in _NORMS:
        raise UserError(
            f"config.json: qk_norm is {config['qk_norm']!r:.80}, which is not supported; "
            "expected null, rms_norm or layer_norm."
        )
    return MMDiT(
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        patch=number(config, "patch_size", 2),
        in_channels=in_channels,
        out_channels=number(config, "out_channels", in_channels if "out_channels" in config else 16),
        text_embed=number(config, "joint_attention_dim", 4096),
        pooled_embed=number(config, "pooled_projection_dim", 2048),
        max_size=number(config, "pos_embed_max_size", 96),
        base_size=number(config, "sample_size", 128),
        qk_norm=_NORMS[config.get("qk_norm")],
        dual_attention=tuple(sorted(set(dual))),
    )


def _config(module: MMDiT) -> dict[str, Any]:
    return {
        "sample_size": module.base_size,
        "patch_size": module.patch,
        "in_channels": module.in_channels,
        "num_layers": module.depth,
        "attention_head_dim": module.head_dim,
        "num_attention_heads": module.heads,
        "joint_attention_dim": module.text_embed,
        "caption_projection_dim": module.heads * module.head_dim,
        "pooled_projection_dim": module.pooled_embed,
        "out_channels": module.out_channels,
        "pos_embed_max_size": module.max_size,
        "dual_attention_layers": list(module.dual_attention),
        "qk_norm": {ours: theirs for theirs, ours in _NORMS.items()}[module.qk_norm],
    }


def _rows(module: MMDiT) -> list[Row]:
    rows = [
        Row("pos_embed.pos_embed", "positions", "raw"),
        Row("pos_embed.proj", "patch_in", "patch", window=module.patch),
        *ENDS,
    ]
    for stack in stacks(module.depth, module.dual_attention):
        rows += joint_rows(
            "transformer_blocks.{i}",
            stack.name,
            first=stack.first,
            qk_norm=module.qk_norm,
            dual=stack.dual,
            last=stack.last,
        )
    return rows


def example(module: Any) -> tuple[Any, ...]:
    """Arguments of `MMDiT` or `Flux`: one image of one patch and one word."""
    cond = Cond(
        text=jnp.zeros((1, 1, module.text_embed)),
        pooled=jnp.zeros((1, module.pooled_embed)),
        guidance=jnp.zeros(1),
    )
    return jnp.zeros((1, module.patch, module.patch, module.in_channels)), jnp.zeros(1), cond


FAMILIES = {
    "SD3Transformer2DModel": Family("SD3Transformer2DModel", "diffusers", _build, _config, _rows, example)
}
