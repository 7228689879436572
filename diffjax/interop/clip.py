"""CLIP's text encoders of transformers, alone or out of a whole CLIP."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.interop.families import Family, fraction, number, require
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.text.clip import ClipText

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def block_rows(layer: str) -> tuple[Row, ...]:
    """The rows of one block of either tower.

    Args:
      layer: how the original's names of block {i} begin.
    """
    return (
        Row(layer + "layer_norm1", "blocks/attention_norm", "norm"),
        *(
            Row(f"{layer}self_attn.{name[0]}_proj", f"blocks/attention/{name}")
            for name in ("query", "key", "value")
        ),
        Row(layer + "self_attn.out_proj", "blocks/attention/out"),
        Row(layer + "layer_norm2", "blocks/mlp_norm", "norm"),
        Row(layer + "mlp.fc1", "blocks/mlp/in"),
        Row(layer + "mlp.fc2", "blocks/mlp/out"),
    )


_ROWS = (
    Row("text_model.embeddings.token_embedding", "tokens", "embed"),
    Row("text_model.embeddings.position_embedding", "positions", "embed"),
    Row("text_model.final_layer_norm", "norm", "norm"),
    *block_rows("text_model.encoder.layers.{i}."),
)
_POSITION_IDS = "text_model.embeddings.position_ids"
_PROJECTION = Row("text_projection", "projection")
# Version 5 of transformers writes CLIPTextModel without the prefix that all others have; all are given it.
_PARTS = ("embeddings.token_", "embeddings.position_", "encoder.layers.", "final_layer_norm.")
_ALIASES = {"text_model.": "", **{part: f"text_model.{part}" for part in _PARTS}}


def _build(config: Mapping[str, Any], store: Store | None = None, projection: int = 0) -> ClipText:
    require(config, model_type=("clip_text_model", "clip"), hidden_act=tuple(ACTIVATIONS))
    eos = config.get("eos_token_id", 49407)
    if isinstance(eos, bool) or not isinstance(eos, int) or eos < 0:
        raise UserError(f"config.json: eos_token_id is {eos!r:.80}; expected the id of a token.")
    return ClipText(
        vocab=number(config, "vocab_size", 49408),
        embed=number(config, "hidden_size", 512),
        layers=number(config, "num_hidden_layers", 12),
        heads=number(config, "num_attention_heads", 8),
        mlp=number(config, "intermediate_size", 2048),
        positions=number(config, "max_position_embeddings", 77),
        activation=ACTIVATIONS[config.get("hidden_act") or "quick_gelu"],
        norm_eps=fraction(config, "layer_norm_eps", 1e-5),
        projection=projection,
        eos=eos,
    )


def _build_projected(config: Mapping[str, Any], store: Store) -> ClipText:
    return _build(config, projection=number(config, "projection_dim", 512))


def _build_whole(config: Mapping[str, Any], store: Store) -> ClipText:
    text = config.get("text_config_dict") or config.get("text_config") or {}  # the former is older, and wins
    if not isinstance(text, dict):
        raise UserError(f"config.json: text_config is {text!r:.80}; expected an object.")
    return _build(text, projection=number(config, "projection_dim", 512))


def _config(clip: ClipText) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": clip.vocab,
        "hidden_size": clip.embed,
        "num_hidden_layers": clip.layers,
        "num_attention_heads": clip.heads,
        "intermediate_size": clip.mlp,
        "max_position_embeddings": clip.positions,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[clip.activation],
        "layer_norm_eps": clip.norm_eps,
        "eos_token_id": clip.eos,
        **({"projection_dim": clip.projection} if clip.projection else {}),
    }


CLIP_TEXT = Family(
    name="CLIPTextModel",
    library="transformers",
    build=_build,
    config=_config,
    rows=lambda clip: _ROWS,
    example=lambda clip: (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    ignored=(_POSITION_IDS, "text_projection."),
    aliases=_ALIASES,
)
CLIP_PROJECTED = CLIP_TEXT._replace(
    name="CLIPTextModelWithProjection",
    build=_build_projected,
    rows=lambda clip: (*_ROWS, _PROJECTION),
    ignored=(_POSITION_IDS,),
)
CLIP_WHOLE = CLIP_PROJECTED._replace(  # it is written as the part that was read
    build=_build_whole, ignored=("vision_model.", "visual_projection.", "logit_scale", _POSITION_IDS)
)
FAMILIES = {
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_PROJECTED,
    "CLIPModel": CLIP_WHOLE,
}
