"""DINOv2 and CLIP's image towers: transformers' names, and those of DINOv2's publisher."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.interop.clip import ACTIVATIONS, block_rows
from diffjax.interop.families import Family, fraction, get, number, require
from diffjax.interop.rows import Row, check, read_params, sources
from diffjax.interop.store import Store
from diffjax.models.vision_transformer import VisionTransformer, resized_positions
from diffjax.nn.placement import unbox

# Their letter, width, blocks and heads; the largest has gated feed-forward layers.
_DINOV2 = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}


def dinov2(letter: str, registers: int) -> VisionTransformer:
    """DINOv2's published networks, "s" to "g", with `registers` registers."""
    embed, layers, heads = _DINOV2[letter]
    return _dinov2(embed, layers, heads, 4 * embed, gated=letter == "g", side=518, registers=registers)


def _dinov2(embed: int, layers: int, heads: int, mlp: int, *, gated: bool, **rest: Any) -> VisionTransformer:
    if gated:  # two thirds, since there is a third layer
        return VisionTransformer(
            embed, layers, heads, (mlp * 2 // 3 + 7) // 8 * 8, activation="silu", gated=True, **rest
        )
    return VisionTransformer(embed, layers, heads, mlp, **rest)


def _mlp_rows(layer: str, names: tuple[str, str], *, gated: bool) -> Sequence[Row]:
    """The feed-forward layers: fc1 and fc2 or, if gated, `names`, of which the first is two of ours."""
    if not gated:
        return (Row(layer + "mlp.fc1", "blocks/mlp/in"), Row(layer + "mlp.fc2", "blocks/mlp/out"))
    return (
        Row(layer + names[0], "blocks/mlp/gate", chunk=(0, 2)),
        Row(layer + names[0], "blocks/mlp/in", chunk=(1, 2)),
        Row(layer + names[1], "blocks/mlp/out"),
    )


def published_rows(network: VisionTransformer) -> Sequence[Row]:
    """DINOv2's names in its publisher's files."""
    layer = "blocks.{i}."
    mlp = _mlp_rows(layer, ("mlp.w12", "mlp.w3"), gated=network.gated)
    return (
        Row("cls_token", "class", "raw"),
        Row("pos_embed", "positions", "raw"),
        *((Row("register_tokens", "registers", "raw"),) if network.registers else ()),
        Row("patch_embed.proj", "patches", "patch", window=network.patch),
        Row(layer + "norm1", "blocks/attention_norm", "norm"),
        *(
            Row(layer + "attn.qkv", f"blocks/attention/{name}", chunk=(index, 3))
            for index, name in enumerate(("query", "key", "value"))
        ),
        Row(layer + "attn.proj", "blocks/attention/out"),
        Row(layer + "ls1.gamma", "blocks/attention_scale", "raw"),
        Row(layer + "norm2", "blocks/mlp_norm", "norm"),
        *mlp,
        Row(layer + "ls2.gamma", "blocks/mlp_scale", "raw"),
        Row("norm", "norm", "norm"),
    )


def _dinov2_rows(network: VisionTransformer) -> Sequence[Row]:
    layer = "encoder.layer.{i}."
    mlp = _mlp_rows(layer, ("mlp.weights_in", "mlp.weights_out"), gated=network.gated)
    return (
        Row("embeddings.cls_token", "class", "raw"),
        Row("embeddings.position_embeddings", "positions", "raw"),
        *((Row("embeddings.register_tokens", "registers", "raw"),) if network.registers else ()),
        Row("embeddings.patch_embeddings.projection", "patches", "patch", window=network.patch),
        Row(layer + "norm1", "blocks/attention_norm", "norm"),
        *(
            Row(f"{layer}attention.attention.{name}", f"blocks/attention/{name}")
            for name in ("query", "key", "value")
        ),
        Row(layer + "attention.output.dense", "blocks/attention/out"),
        Row(layer + "layer_scale1.lambda1", "blocks/attention_scale", "raw"),
        Row(layer + "norm2", "blocks/mlp_norm", "norm"),
        *mlp,
        Row(layer + "layer_scale2.lambda1", "blocks/mlp_scale", "raw"),
        Row("layernorm", "norm", "norm"),
    )


def _clip_rows(network: VisionTransformer) -> Sequence[Row]:
    return (
        Row("vision_model.embeddings.class_embedding", "class", "raw"),
        Row("vision_model.embeddings.position_embedding.weight", "positions", "raw"),
        Row("vision_model.embeddings.patch_embedding", "patches", "patch", window=network.patch),
        Row("vision_model.pre_layrnorm", "first_norm", "norm"),
        *block_rows("vision_model.encoder.layers.{i}."),
        Row("vision_model.post_layernorm", "norm", "norm"),
        Row("visual_projection", "projection"),
    )


def _build_dinov2(config: Mapping[str, Any], store: Store) -> VisionTransformer:
    require(config, hidden_act="gelu", qkv_bias=True, num_channels=3)
    embed = number(config, "hidden_size", 768)
    with_registers = config.get("model_type") == "dinov2_with_registers"
    return _dinov2(
        embed,
        number(config, "num_hidden_layers", 12),
        number(config, "num_attention_heads", 12),
        number(config, "mlp_ratio", 4) * embed,
        gated=bool(get(config, "use_swiglu_ffn", False)),
        side=number(config, "image_size", 224),
        patch=number(config, "patch_size", 14),
        registers=number(config, "num_register_tokens", 4) if with_registers else 0,
        norm_eps=fraction(config, "layer_norm_eps", 1e-6),
    )


def _build_clip(config: Mapping[str, Any], store: Store) -> VisionTransformer:
    sizes = config.get("vision_config_dict") or config.get("vision_config") or config
    if not isinstance(sizes, dict):
        raise UserError(f"config.json: vision_config is {sizes!r:.80}; expected an object.")
    require(sizes, hidden_act=tuple(ACTIVATIONS), num_channels=3)
    return VisionTransformer(
        number(sizes, "hidden_size", 768),
        number(sizes, "num_hidden_layers", 12),
        number(sizes, "num_attention_heads", 12),
        number(sizes, "intermediate_size", 3072),
        side=number(sizes, "image_size", 224),
        patch=number(sizes, "patch_size", 32),
        activation=ACTIVATIONS[sizes.get("hidden_act") or "quick_gelu"],
        scaled=False,
        first_norm=True,
        patch_bias=False,
        batched=False,
        norm_eps=fraction(sizes, "layer_norm_eps", 1e-5),
        projection=number(config, "projection_dim", 512),
    )


def _config(network: VisionTransformer) -> dict[str, Any]:
    raise NotImplementedError("networks that are only applied are not written")


def _example(network: VisionTransformer) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((1, network.side, network.side, 3), jnp.float32),)


DINOV2 = Family(
    name="Dinov2Model",
    library="transformers",
    build=_build_dinov2,
    config=_config,
    rows=_dinov2_rows,
    example=_example,
    ignored=("embeddings.mask_token",),
)
CLIP_VISION = Family(
    name="CLIPVisionModelWithProjection",
    library="transformers",
    build=_build_clip,
    config=_config,
    rows=_clip_rows,
    example=_example,
    ignored=("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"),
)
FAMILIES = {
    "Dinov2Model": DINOV2,
    "Dinov2WithRegistersModel": DINOV2._replace(name="Dinov2WithRegistersModel"),
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "CLIPModel": CLIP_VISION._replace(name="CLIPModel"),
}


def read_published(store: Store, network: VisionTransformer) -> Any:
    """The parameters of DINOv2 out of its publisher's file.

    Raises:
      UserError: tensors are missing, or not what the network needs.
    """
    shapes = unbox(jax.eval_shape(network.init, jax.random.key(0), *_example(network))["params"])
    table = sources(published_rows(network), shapes)
    check(store, table, lambda name: name == "mask_token")
    return read_params(store, table)


def for_side(params: Any, network: VisionTransformer, side: int) -> Any:
    """Parameters of DINOv2 with positions for pictures of another side, as its publisher's code has them."""
    positions = resized_positions(
        np.asarray(params["positions"]),
        side // network.patch,
        offset=0.0 if network.registers else 0.1,
        antialias=bool(network.registers),
    )
    return {**params, "positions": positions}
