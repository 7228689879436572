"""T5's encoder of transformers, alone or out of a whole T5."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.interop.families import Family, fraction, number, require
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.text.t5 import T5Encoder

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
_ATTENTION, _MLP = "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."


def _build(config: Mapping[str, Any], store: Store) -> T5Encoder:
    projection = str(config.get("feed_forward_proj") or "relu")
    gated = projection.startswith("gated-")
    theirs = projection.removeprefix("gated-")
    if projection == "gated-gelu":  # an old name, which means another function than "gelu"
        theirs = "gelu_new"
    if theirs not in _ACTIVATIONS:
        raise UserError(f"config.json: feed_forward_proj is {projection!r:.80}; supported are "
                        f"{', '.join(_ACTIVATIONS)}, and the same behind 'gated-'.")  # fmt: skip
    require(config, model_type="t5", dense_act_fn=theirs, is_gated_act=gated, is_decoder=False)
    buckets = number(config, "relative_attention_num_buckets", 32)
    max_distance = number(config, "relative_attention_max_distance", 128)
    if buckets < 4 or max_distance <= buckets // 4:
        raise UserError(
            f"config.json: {buckets} relative_attention_num_buckets up to relative_attention_max_distance "
            f"{max_distance} make no buckets; expected at least 4, and a distance of over a quarter of them."
        )
    return T5Encoder(
        vocab=number(config, "vocab_size", 32128),
        embed=number(config, "d_model", 512),
        layers=number(config, "num_layers", 6),
        heads=number(config, "num_heads", 8),
        head_dim=number(config, "d_kv", 64),
        mlp=number(config, "d_ff", 2048),
        activation=_ACTIVATIONS[theirs],
        gated=gated,
        buckets=buckets,
        max_distance=max_distance,
        norm_eps=fraction(config, "layer_norm_epsilon", 1e-6),
    )


def _config(t5: T5Encoder) -> dict[str, Any]:
    theirs = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[t5.activation]
    if t5.gated and theirs == "gelu":
        raise UserError("T5 of transformers cannot have a gated 'gelu', only a gated 'gelu_tanh'.")
    return {
        "model_type": "t5",
        "vocab_size": t5.vocab,
        "d_model": t5.embed,
        "num_layers": t5.layers,
        "num_heads": t5.heads,
        "d_kv": t5.head_dim,
        "d_ff": t5.mlp,
        "feed_forward_proj": f"gated-{theirs.replace('gelu_new', 'gelu')}" if t5.gated else theirs,
        "relative_attention_num_buckets": t5.buckets,
        "relative_attention_max_distance": t5.max_distance,
        "layer_norm_epsilon": t5.norm_eps,
    }


def _rows(t5: T5Encoder) -> tuple[Row, ...]:
    first = {"gate": "wi_0", "in": "wi_1"} if t5.gated else {"in": "wi"}
    mlp = {**first, "out": "wo"}
    return (
        Row("shared", "tokens", "embed"),
        Row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "positions", "raw"),
        Row("encoder.final_layer_norm", "norm", "norm"),
        Row(_ATTENTION + "layer_norm", "blocks/attention_norm", "norm"),
        *(
            Row(f"{_ATTENTION}SelfAttention.{name[0]}", f"blocks/attention/{name}")
            for name in ("query", "key", "value", "out")
        ),
        Row(_MLP + "layer_norm", "blocks/mlp_norm", "norm"),
        *(Row(f"{_MLP}DenseReluDense.{theirs}", f"blocks/mlp/{ours}") for ours, theirs in mlp.items()),
    )


T5_ENCODER = Family(
    name="T5EncoderModel",
    library="transformers",
    build=_build,
    config=_config,
    rows=_rows,
    example=lambda t5: (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    ignored=("decoder.", "lm_head."),
    aliases={"encoder.embed_tokens.": "shared."},
)
_WHOLE = ("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")
FAMILIES = dict.fromkeys(("T5EncoderModel", *_WHOLE), T5_ENCODER)
