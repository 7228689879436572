"""BERT against the original library, and what its loader refuses."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.text.bert import Bert, BertConfig, load_params

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = GOLDEN / "bert_tiny.safetensors"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "bert_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def raw(golden):
    return json.loads(str(golden["config"]))


@pytest.fixture(scope="module")
def config(raw):
    return BertConfig.from_dict(raw)


@pytest.fixture(scope="module")
def run(config):
    params = load_params(WEIGHTS, config)
    return jax.jit(lambda ids, mask: Bert(config).apply(params, ids, mask))


def test_parity(run, golden):
    states = run(golden["in_ids"], golden["in_mask"])
    mask = golden["in_mask"]
    np.testing.assert_allclose(states[mask], golden["out_states"][mask], atol=1e-4, rtol=1e-4)
    # Were the values tiny, an absolute tolerance would prove little.
    assert np.abs(golden["out_states"][mask]).mean() > 0.5


def test_padding_does_not_change_real_tokens(run, golden):
    ids, mask = golden["in_ids"][1:2], golden["in_mask"][1:2]
    count = int(mask.sum())
    assert count == 9
    other = np.where(mask, ids, 57)
    padded = run(other, mask)[:, :count]
    bare = run(ids[:, :count], mask[:, :count])
    np.testing.assert_allclose(padded, bare, atol=1e-5)


def test_every_parameter_has_logical_names_and_matches_the_file(config):
    boxed = jax.eval_shape(
        Bert(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    )
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    loaded = load_params(WEIGHTS, config)
    assert jax.tree.structure(nn.unbox(boxed)) == jax.tree.structure(loaded)
    assert jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed)) == jax.tree.map(np.shape, loaded)


def test_too_many_tokens(config):
    with pytest.raises(ValueError, match=r"25 tokens.*24 positions"):
        jax.eval_shape(
            Bert(config).init, jax.random.key(0), jnp.zeros((1, 25), jnp.int32), jnp.ones((1, 25), bool)
        )


def refuse(tmp_path, config, change):
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "model.safetensors", config)
    return str(caught.value)


def test_missing_tensor(tmp_path, config):
    name = "encoder.layer.1.attention.self.key.bias"
    assert f"{name} is missing" in refuse(tmp_path, config, lambda t: t.pop(name))


def test_unexpected_tensor(tmp_path, config):
    name = "encoder.layer.2.attention.self.key.bias"
    extra = np.zeros(32, np.float32)
    assert f"{name} is unexpected" in refuse(tmp_path, config, lambda t: t.update({name: extra}))


def test_misshaped_tensor(tmp_path, config):
    # Transposed, as a mapping that forgets that linear weights are [out, in] would take it.
    name = "encoder.layer.0.intermediate.dense.weight"
    message = refuse(tmp_path, config, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert f"{name} is [32, 64], expected [64, 32]" in message


def test_tensor_of_integers(tmp_path, config):
    name = "embeddings.LayerNorm.bias"
    assert f"{name} is I32" in refuse(tmp_path, config, lambda t: t.update({name: np.zeros(32, np.int32)}))


def test_many_faults_stay_short(tmp_path, config):
    message = refuse(tmp_path, config, lambda t: t.clear() or t.update(x=np.zeros(1, np.float32)))
    assert "more." in message
    assert len(message) < 1200


def test_half_precision_weights(tmp_path, config, golden):
    path = tmp_path / "model.safetensors"
    save_file({name: value.astype(np.float16) for name, value in load_file(WEIGHTS).items()}, path)
    params = load_params(path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    states = Bert(config).apply(params, golden["in_ids"], golden["in_mask"])
    mask = golden["in_mask"]
    np.testing.assert_allclose(states[mask], golden["out_states"][mask], atol=0.05)


def test_pickle_is_refused(tmp_path, config):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*safetensors"):
        load_params(tmp_path / "model.safetensors", config)
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "elsewhere" / "model.safetensors", config)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, WEIGHTS.read_bytes()[:-1]])
def test_damaged_weights(tmp_path, config, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        load_params(tmp_path / "model.safetensors", config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", None),
        ("hidden_size", 33),
        ("hidden_size", "32"),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("intermediate_size", True),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", "x" * 10_000),
        ("hidden_act", "gelu_new"),
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
    ],
)
def test_config_is_checked(raw, key, value):
    with pytest.raises(UserError, match=key) as caught:
        BertConfig.from_dict({**raw, key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * 2**21 + b'"'])
def test_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        BertConfig.read(tmp_path / "config.json")


def test_config_missing(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read: No such file"):
        BertConfig.read(tmp_path / "config.json")
