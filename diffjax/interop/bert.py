"""BERT of transformers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.interop.families import Family, fraction, number, require
from diffjax.interop.rows import Row
from diffjax.interop.store import Store
from diffjax.text.bert import Bert

_LAYER = "encoder.layer.{i}."
_ROWS = (
    Row("embeddings.word_embeddings", "words", "embed"),
    Row("embeddings.position_embeddings", "positions", "embed"),
    Row("embeddings.token_type_embeddings", "types", "embed"),
    Row("embeddings.LayerNorm", "norm", "norm"),
    *(
        Row(f"{_LAYER}attention.self.{name}", f"blocks/attention/{name}")
        for name in ("query", "key", "value")
    ),
    Row(_LAYER + "attention.output.dense", "blocks/attention/out"),
    Row(_LAYER + "attention.output.LayerNorm", "blocks/attention_norm", "norm"),
    Row(_LAYER + "intermediate.dense", "blocks/mlp/in"),
    Row(_LAYER + "output.dense", "blocks/mlp/out"),
    Row(_LAYER + "output.LayerNorm", "blocks/mlp_norm", "norm"),
)
_SIZES = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
}
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _build(config: Mapping[str, Any], store: Store) -> Bert:
    require(config, **_FIXED)
    sizes = {ours: number(config, theirs) for ours, theirs in _SIZES.items()}
    return Bert(**sizes, norm_eps=fraction(config, "layer_norm_eps", 1e-12))


def _config(bert: Bert) -> dict[str, Any]:
    sizes = {theirs: getattr(bert, ours) for ours, theirs in _SIZES.items()}
    return {**_FIXED, **sizes, "layer_norm_eps": bert.norm_eps}


BERT = Family(
    name="BertModel",
    library="transformers",
    build=_build,
    config=_config,
    rows=lambda bert: _ROWS,
    example=lambda bert: (
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
        jax.ShapeDtypeStruct((1, 2), jnp.bool_),
    ),
    ignored=("embeddings.position_ids", "pooler."),
)
FAMILIES = {"BertModel": BERT}
