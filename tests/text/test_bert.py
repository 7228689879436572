"""BERT against the original library, and what its folders are refused for."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop.bert import BERT, FAMILIES
from diffjax.interop.model import open_network, write_network

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = GOLDEN / "bert_tiny.safetensors"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "bert_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def raw(golden):
    return {**json.loads(str(golden["config"])), "architectures": ["BertModel"]}


def write_folder(folder, raw, tensors=None):
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is None:
        (folder / "model.safetensors").write_bytes(WEIGHTS.read_bytes())
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def network(raw, tmp_path_factory):
    return open_network(write_folder(tmp_path_factory.mktemp("bert"), raw), FAMILIES)


@pytest.fixture(scope="module")
def params(network):
    return network.read()


@pytest.fixture(scope="module")
def run(network, params):
    return jax.jit(lambda ids, mask: network.module.apply({"params": params}, ids, mask))


def test_parity(run, golden):
    states = run(golden["in_ids"], golden["in_mask"])
    mask = golden["in_mask"]
    np.testing.assert_allclose(states[mask], golden["out_states"][mask], atol=1e-4, rtol=1e-4)
    # Were the values tiny, an absolute tolerance would prove little.
    assert np.abs(golden["out_states"][mask]).mean() > 0.5


def test_an_unrolled_loop_changes_nothing(network, params, run, golden):
    ids, mask = golden["in_ids"], golden["in_mask"]
    unrolled = network.module.clone(scan=False).apply({"params": params}, ids, mask)
    np.testing.assert_allclose(unrolled, run(ids, mask), atol=1e-5)


def test_padding_does_not_change_real_tokens(run, golden):
    ids, mask = golden["in_ids"][1:2], golden["in_mask"][1:2]
    count = int(mask.sum())
    assert count == 9
    other = np.where(mask, ids, 57)
    padded = run(other, mask)[:, :count]
    bare = run(ids[:, :count], mask[:, :count])
    np.testing.assert_allclose(padded, bare, atol=1e-5)


def test_every_parameter_has_logical_names(network):
    axes = jax.tree.leaves(network.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert len(axes) == len(jax.tree.leaves(network.shapes))
    assert all(name is not None for names in axes for name in names)


def test_is_written_as_it_was_read(network, params, tmp_path):
    write_network(tmp_path, BERT, network.module, params)
    original, written = load_file(WEIGHTS), load_file(tmp_path / "model.safetensors")
    assert original.keys() - written.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in written.items():
        np.testing.assert_array_equal(original[name], tensor, strict=True)
    assert open_network(tmp_path, FAMILIES).module == network.module


def test_too_many_tokens(network):
    with pytest.raises(ValueError, match=r"25 tokens.*24 positions"):
        jax.eval_shape(
            network.module.init, jax.random.key(0), jnp.zeros((1, 25), jnp.int32), jnp.ones((1, 25), bool)
        )


def refuse(tmp_path, raw, change):
    tensors = load_file(WEIGHTS)
    change(tensors)
    with pytest.raises(UserError) as caught:
        open_network(write_folder(tmp_path, raw, tensors), FAMILIES).read()
    return str(caught.value)


def test_missing_tensor(tmp_path, raw):
    name = "encoder.layer.1.attention.self.key.bias"
    assert f"missing: {name}" in refuse(tmp_path, raw, lambda t: t.pop(name))


def test_unexpected_tensor(tmp_path, raw):
    name = "encoder.layer.2.attention.self.key.bias"
    extra = np.zeros(32, np.float32)
    assert f"unexpected: {name}" in refuse(tmp_path, raw, lambda t: t.update({name: extra}))


def test_misshaped_tensor(tmp_path, raw):
    # Transposed, as a mapping that forgets that linear weights are [out, in] would take it.
    name = "encoder.layer.0.intermediate.dense.weight"
    message = refuse(tmp_path, raw, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert f"{name} has shape (32, 64), expected (64, 32)" in message


def test_tensor_of_integers(tmp_path, raw):
    name = "embeddings.LayerNorm.bias"
    assert f"{name} is I32" in refuse(tmp_path, raw, lambda t: t.update({name: np.zeros(32, np.int32)}))


def test_many_faults_stay_short(tmp_path, raw):
    message = refuse(tmp_path, raw, lambda t: t.clear() or t.update(x=np.zeros(1, np.float32)))
    assert "more" in message
    assert len(message) < 1500


def test_half_precision_weights(tmp_path, raw, golden, run):
    halves = {name: value.astype(np.float16) for name, value in load_file(WEIGHTS).items()}
    network = open_network(write_folder(tmp_path, raw, halves), FAMILIES)
    params = network.read()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    states = network.module.apply({"params": params}, golden["in_ids"], golden["in_mask"])
    mask = golden["in_mask"]
    np.testing.assert_allclose(states[mask], golden["out_states"][mask], atol=0.05)


def test_pickle_is_refused(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="holds no weights"):
        open_network(tmp_path, FAMILIES)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*safetensors"):
        open_network(tmp_path, FAMILIES)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, WEIGHTS.read_bytes()[:-1]])
def test_damaged_weights(tmp_path, raw, content):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        open_network(tmp_path, FAMILIES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", None),
        ("hidden_size", "32"),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("intermediate_size", True),
        ("layer_norm_eps", float("inf")),
        ("layer_norm_eps", "x" * 10_000),
        ("hidden_act", "gelu_new"),
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
    ],
)
def test_config_is_checked(tmp_path, raw, key, value):
    with pytest.raises(UserError, match=key) as caught:
        open_network(write_folder(tmp_path, {**raw, key: value}), FAMILIES)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * 2**21 + b'"'])
def test_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        open_network(tmp_path, FAMILIES)


def test_heads_that_do_not_divide_the_width(tmp_path, raw):
    with pytest.raises(UserError, match=r"width 33 is not divisible by 4 heads"):
        open_network(write_folder(tmp_path, {**raw, "hidden_size": 33}), FAMILIES)


def test_config_missing(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_network(tmp_path, FAMILIES)
