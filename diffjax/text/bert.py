"""BERT (Devlin et al., 2018) as an encoder of text, and its weights as Hugging Face publishes them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from diffjax.errors import UserError
from diffjax.nn.attention import Attention
from diffjax.nn.layers import dense

# Our modules by the names of the originals, and the kind of each.
_EMBEDDINGS = {
    "embeddings.word_embeddings": ("words", "embed"),
    "embeddings.position_embeddings": ("positions", "embed"),
    "embeddings.token_type_embeddings": ("types", "embed"),
    "embeddings.LayerNorm": ("norm", "norm"),
}
_LAYER = {
    "attention.self.query": ("attention/query", "dense"),
    "attention.self.key": ("attention/key", "dense"),
    "attention.self.value": ("attention/value", "dense"),
    "attention.output.dense": ("attention/out", "dense"),
    "attention.output.LayerNorm": ("attention_norm", "norm"),
    "intermediate.dense": ("mlp_in", "dense"),
    "output.dense": ("mlp_out", "dense"),
    "output.LayerNorm": ("mlp_norm", "norm"),
}
_PARAMETERS = {
    "embed": {"weight": "embedding"},
    "norm": {"weight": "scale", "bias": "bias"},
    "dense": {"weight": "kernel", "bias": "bias"},  # the kernel is the transposed weight
}
# Published along with the encoder, but no part of it.
_UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}

# The sizes that config.json must give, with a bound that no real BERT comes near: the file may be anyone's.
_SIZES = {
    "vocab": ("vocab_size", 2**24),
    "embed": ("hidden_size", 2**16),
    "layers": ("num_hidden_layers", 2**10),
    "heads": ("num_attention_heads", 2**10),
    "mlp": ("intermediate_size", 2**18),
    "positions": ("max_position_embeddings", 2**20),
    "types": ("type_vocab_size", 2**10),
}
# What this implementation does, as config.json words it; an absent key means the same.
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_MAX_CONFIG_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT.

    Attributes:
      vocab: size of the vocabulary.
      embed: width of the token states.
      layers: number of transformer layers.
      heads: number of attention heads.
      mlp: hidden width of the feed-forward layers.
      positions: the most tokens it can read.
      types: number of token types; only type 0 is used here.
      norm_eps: epsilon of the layer norms.
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    mlp: int
    positions: int
    types: int = 2
    norm_eps: float = 1e-12

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Read and check a Hugging Face config.json."""
        try:
            with open(path, "rb") as file:
                raw = json.loads(file.read(_MAX_CONFIG_BYTES))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not valid JSON.") from error
        if not isinstance(raw, dict):
            raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}.")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> "BertConfig":
        """Check the fields of a Hugging Face BERT configuration.

        Args:
          raw: the fields; those that do not touch the encoder's output are ignored.
          source: where they come from, for error messages.

        Returns:
          The configuration; UserError where it is not one of a BERT that `Bert` can run.
        """
        for key, ours in _FIXED.items():
            if raw.get(key, ours) != ours:
                raise UserError(f"{source}: {key} is {raw[key]!r:.80}; only {ours!r} is supported.")
        sizes = {}
        for ours, (key, most) in _SIZES.items():
            value = raw.get(key)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(
                    f"{source}: {key} is {value!r:.80}; expected a whole number from 1 to {most}."
                )
            sizes[ours] = value
        if sizes["embed"] % sizes["heads"]:
            raise UserError(
                f"{source}: hidden_size {sizes['embed']} is not divisible by "
                f"num_attention_heads {sizes['heads']}."
            )
        eps = raw.get("layer_norm_eps", 1e-12)
        if type(eps) not in (int, float) or not (math.isfinite(eps) and 0 < eps < 1):
            raise UserError(f"{source}: layer_norm_eps is {eps!r:.80}; expected a number between 0 and 1.")
        return cls(**sizes, norm_eps=float(eps))


class BertLayer(nn.Module):
    """Attention and MLP, each followed by its layer norm (post-LN)."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`x [batch, length, embed], mask [batch, length] -> [batch, length, embed]`."""
        config = self.config
        y = Attention(config.heads, name="attention")(x, mask=mask)
        x = _norm(config, "attention_norm")(x + y)
        y = dense(config.mlp, axes=("embed", "mlp"), name="mlp_in")(x)
        y = nn.gelu(y, approximate=False)
        y = dense(config.embed, axes=("mlp", "embed"), name="mlp_out")(y)
        return _norm(config, "mlp_norm")(x + y)


class Bert(nn.Module):
    """BERT's encoder, float32, without dropout: it is never trained here."""

    config: BertConfig

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode tokens.

        Args:
          ids: `[batch, length]` token ids, all of them type 0.
          mask: `[batch, length]` bool, True at real tokens; at least one per row.

        Returns:
          The last hidden states, `[batch, length, embed]`; without meaning where `mask` is False.
        """
        config = self.config
        length = ids.shape[1]
        if length > config.positions:
            raise ValueError(f"{length} tokens, but this BERT has {config.positions} positions")
        x = _embed(config.vocab, config, "words")(ids)
        x += _embed(config.positions, config, "positions")(jnp.arange(length))
        x += _embed(config.types, config, "types")(jnp.zeros_like(ids))
        x = _norm(config, "norm")(x)
        for index in range(config.layers):
            x = BertLayer(config, name=f"layer_{index}")(x, mask)
        return x


def load_params(path: Path, config: BertConfig) -> dict[str, Any]:
    """Read the parameters of `Bert` from a safetensors file with the original names.

    Args:
      path: the file, as `BertModel.save_pretrained` writes it.
      config: its configuration.

    Returns:
      The Linen variables `{"params": …}` as float32 numpy arrays. A tensor that is missing, unexpected or of
      another shape than `config` asks for is named in a UserError.
    """
    if not path.is_file():
        raise UserError(_no_weights(path))
    sources = _sources(config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    abstract = nn.unbox(jax.eval_shape(Bert(config).init, jax.random.key(0), *tokens))
    shapes = {
        "/".join(key.key for key in keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract["params"])
    }
    expected = {name: _theirs(ours, shapes[ours]) for name, ours in sources.items()}
    params: dict[str, Any] = {}
    for name, tensor in read_tensors(path, expected, ignored=_UNUSED).items():
        ours = sources[name]
        *modules, leaf = ours.split("/")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = tensor.T if leaf == "kernel" else tensor
    return {"params": params}


def read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], *, ignored: set[str] | frozenset[str] = frozenset()
) -> dict[str, np.ndarray]:
    """Read exactly the `expected` tensors (name to shape) as float32; names all faults before reading any."""
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys() if name not in ignored}  # noqa: SIM118
            faults = [f"{name} is missing" for name in expected if name not in found]
            faults += [f"{name} is unexpected" for name in found if name not in expected]
            for name in expected.keys() & found.keys():
                shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
                if shape != expected[name]:
                    faults.append(f"{name} is {list(shape)}, expected {list(expected[name])}")
                elif dtype not in ("F16", "F32", "F64"):
                    faults.append(f"{name} is {dtype}, expected a float of 16 to 64 bits")
            if faults:
                more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
                listed = "; ".join(fault[:200] for fault in sorted(faults)[:8])
                raise UserError(f"{path}: not the weights that its config.json describes: {listed}{more}.")
            return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again.") from error


def _sources(config: BertConfig) -> dict[str, str]:
    """Our parameter paths by the original tensor names."""
    modules = dict(_EMBEDDINGS)
    for index in range(config.layers):
        for theirs, (ours, kind) in _LAYER.items():
            modules[f"encoder.layer.{index}.{theirs}"] = (f"layer_{index}/{ours}", kind)
    return {
        f"{theirs}.{suffix}": f"{ours}/{leaf}"
        for theirs, (ours, kind) in modules.items()
        for suffix, leaf in _PARAMETERS[kind].items()
    }


def _theirs(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our parameter in the original, where linear weights are `[out, in]`."""
    return shape[::-1] if ours.endswith("/kernel") else shape


def _no_weights(path: Path) -> str:
    if (path.parent / "pytorch_model.bin").is_file():
        return (
            f"{path.parent}: has only pytorch_model.bin, a pickle, which can run code when it is read. Get "
            "the model's safetensors, or rewrite it with transformers' save_pretrained(…)."
        )
    return f"{path}: no such file; expected the weights of a BERT as safetensors."


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        use_fast_variance=False,  # E[x²] - E[x]² loses digits, and the original does not take it
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)),
        name=name,
    )


def _embed(rows: int, config: BertConfig, name: str) -> nn.Embed:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    return nn.Embed(rows, config.embed, embedding_init=init, name=name)
