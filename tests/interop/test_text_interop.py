"""Text encoders of public folders against transformers and diffusers, and folders that mean harm."""

import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from networks import GOLDEN, relative_error
from safetensors.numpy import load_file, save_file
from text_folders import FOLDERS, pipeline

from diffjax.errors import UserError
from diffjax.interop import clip, t5
from diffjax.interop.model import open_network
from diffjax.interop.text import open_text_encoder, read_tokenizer
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.text.compose import SD3Text

TEXT = GOLDEN / "text"
FAMILIES = {**t5.FAMILIES, **clip.FAMILIES}
GATED = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}


@functools.cache
def golden(file):
    return dict(np.load(TEXT / f"{file}.npz"))


@functools.cache
def opened(name):
    network = open_network(TEXT / name, FAMILIES)
    return network, network.read()


def rewritten(folder, name, tensors, config=()):
    """A copy of a model with other tensors, and other settings."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    said = json.loads((TEXT / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **dict(config)}))
    return folder


def same_as(name, network):
    params = network.read()
    jax.tree.map(np.testing.assert_array_equal, params, opened(name)[1])
    return network.module == opened(name)[0].module


def test_the_encoder_of_a_whole_t5_under_either_name_of_its_embedding(tmp_path):
    tensors = load_file(TEXT / "t5" / "model.safetensors")
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((2, 2), np.float32)}
    whole = {**tensors, **extra, "lm_head.weight": np.ones((2, 2), np.float32)}
    for changed in ({**whole, "encoder.embed_tokens.weight": tensors["shared.weight"]}, dict(whole)):
        if "encoder.embed_tokens.weight" not in changed:
            changed["encoder.embed_tokens.weight"] = changed.pop("shared.weight")
        config = {"architectures": ["T5ForConditionalGeneration"]}
        assert same_as("t5", open_network(rewritten(tmp_path, "t5", changed, config), FAMILIES))


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    tensors = load_file(TEXT / "t5" / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1.0
    with pytest.raises(UserError, match="is there twice"):
        open_network(rewritten(tmp_path, "t5", tensors), FAMILIES)


def test_the_text_encoder_of_a_whole_clip(tmp_path):
    tensors = load_file(TEXT / "clip_lp" / "model.safetensors")
    ids = np.arange(16)[None]
    tensors |= {"logit_scale": np.ones((), np.float32), "text_model.embeddings.position_ids": ids}
    for name in ("embeddings.position_embedding.weight", "encoder.layers.0.layer_norm1.bias"):
        tensors[f"vision_model.{name}"] = np.ones(2, np.float32)
    text = json.loads((TEXT / "clip_lp" / "config.json").read_text())
    config = {"architectures": ["CLIPModel"], "text_config": text, "projection_dim": 12, "hidden_size": 5}
    assert same_as("clip_lp", open_network(rewritten(tmp_path, "clip_lp", tensors, config), FAMILIES))


def test_names_with_and_without_the_prefix_of_clip(tmp_path):
    tensors = {f"text_model.{k}": v for k, v in load_file(TEXT / "clip_l" / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    assert same_as("clip_l", open_network(rewritten(tmp_path, "clip_l", tensors), FAMILIES))


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        (t5, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'"),
        (t5, {**GATED, "dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
        (t5, {**GATED, "is_gated_act": False}, "is_gated_act is False"),
        (t5, {"model_type": "umt5"}, "model_type is 'umt5'"),
        (t5, {"relative_attention_num_buckets": 3}, "make no buckets"),
        (t5, {"relative_attention_max_distance": 8}, "make no buckets"),
        (t5, {"layer_norm_epsilon": "1"}, "layer_norm_epsilon is '1'"),
        (clip, {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        (clip, {"eos_token_id": [2]}, "eos_token_id is"),
        (clip, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (clip, {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ],
)
def test_settings_that_are_refused(family, setting, message):
    build = next(iter(family.FAMILIES.values())).build
    with pytest.raises(UserError, match=message):
        build(setting, None)


@pytest.mark.parametrize(
    ("projection", "activation", "gated"),
    [("relu", "relu", False), ("gated-gelu", "gelu_tanh", True), ("gelu", "gelu", False),
     ("gated-gelu_new", "gelu_tanh", True), ("gated-silu", "silu", True)],
)  # fmt: skip
def test_activations_of_t5(projection, activation, gated):
    module = t5.T5_ENCODER.build({"feed_forward_proj": projection}, None)
    assert (module.activation, module.gated) == (activation, gated)
    said = t5.T5_ENCODER.config(module)
    assert t5.T5_ENCODER.build(said, None) == module


def check(encoder, name, length):
    """An encoder against what the pipeline of this name gave."""
    arrays = golden("pipelines")
    captions = json.loads(str(arrays["captions"]))
    encoded = encoder.encode(captions, length=length)
    mask = arrays.get(f"{name}/mask", np.ones(encoded.mask.shape, bool))
    np.testing.assert_array_equal(encoded.mask, mask)
    expected = arrays[f"{name}/states"]
    assert encoded.states.shape == expected.shape == (len(captions), length, encoder.embed)
    assert relative_error(encoded.states[mask], expected[mask]) < 1e-4
    assert not encoded.states[~mask].any()
    if f"{name}/pooled" in arrays:
        assert relative_error(encoded.pooled, arrays[f"{name}/pooled"]) < 1e-4
    assert {encoded.states.dtype, encoded.pooled.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("kind", "length", "default"),
    [
        ("sd15", 16, 16),
        ("sdxl", 16, 16),
        ("sd3", 36, 272),
        ("flux", 20, 512),
        ("pixart", 20, 120),
        ("if", 77, 77),
    ],
)
def test_captions_are_encoded_as_pipelines_do(kind, length, default, tmp_path):
    encoder = open_text_encoder(pipeline(tmp_path, kind), kind)
    assert encoder.length == default
    check(encoder, kind, length)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_skipped_blocks_of_clip(kind, tmp_path):
    check(open_text_encoder(pipeline(tmp_path, kind), kind, clip_skip=1), f"{kind}_skip", 16)


def test_sd3_without_t5_and_sdxl_without_its_first_encoder(tmp_path):
    folder = pipeline(tmp_path, "sd3", without=("text_encoder_3", "tokenizer_3"))
    assert open_text_encoder(folder, "sd3").embed == 4096
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"joint_attention_dim": 40}')
    encoder = open_text_encoder(folder, "sd3")
    check(encoder, "sd3_without", 36)
    (folder / "text_encoder").unlink()
    refiner = open_text_encoder(folder, "sdxl").encode(["the red bird"], length=16)
    assert [refiner.states.shape, refiner.pooled.shape] == [(1, 16, 16), (1, 12)]
    with pytest.raises(UserError, match="do not fit the width 20"):
        SD3Text(encoder._parts, None, embed=20)


def test_the_length_of_pixart_sigma(tmp_path):
    (pipeline(tmp_path, "pixart") / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    assert open_text_encoder(tmp_path, "pixart").length == 300


def test_lengths_batches_and_hostile_captions(tmp_path):
    encoder = open_text_encoder(pipeline(tmp_path, "flux"), "flux")
    captions = json.loads(str(golden("pipelines")["captions"]))
    assert encoder.truncated(captions, 20) == [0, 2, 3]  # 0 and 2 because of CLIP's 16 tokens
    assert encoder.truncated(["a", "x" * 10_001], 512) == [1]
    assert encoder.truncated([], 20) == []
    many = encoder.encode(captions * 3, length=12)
    few = encoder.encode(captions[1:3], length=12)
    assert many.states.shape == (12, 12, 40)
    np.testing.assert_allclose(many.states[5:7], few.states, atol=1e-4)
    assert encoder.encode([], length=12).states.shape == (0, 12, 40)
    hostile = ["x" * 1_000_000, "\ud800 half", "\0", "<|endoftext|>", "</s><pad>", "\n"]
    assert np.isfinite(encoder.encode(hostile, length=12).states).all()
    for length in (0, 513):
        with pytest.raises(UserError, match=f"length of {length} tokens"):
            encoder.encode(["a"], length=length)


def test_the_fingerprint_follows_weights_tokenizers_and_settings(tmp_path):
    folder = pipeline(tmp_path, "sdxl")
    prints = [open_text_encoder(folder, "sdxl", **settings).fingerprint
              for settings in ({}, {}, {"clip_skip": 1}, {"dtype": jnp.bfloat16})]  # fmt: skip
    assert prints[0] == prints[1]
    for part, file in (("tokenizer_2", "merges.txt"), ("text_encoder_2", "model.safetensors")):
        (folder / part).unlink()
        shutil.copytree(TEXT / FOLDERS["sdxl"][part], folder / part)
        content = (folder / part / file).read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if part != "tokenizer_2" else content + b"t h\n"
        (folder / part / file).write_bytes(changed)
        prints.append(open_text_encoder(folder, "sdxl").fingerprint)
    assert len(set(prints)) == 5


def test_divided_over_a_mesh_and_in_bfloat16(tmp_path):
    folder = pipeline(tmp_path, "if")
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    placed = []

    def place(shapes, axes):
        placed.append(param_shardings(mesh, Rules(), shapes, axes, min_size=1))
        return placed[-1]

    check(open_text_encoder(folder, "if", place=place), "if", 77)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(placed))
    low = open_text_encoder(folder, "if", dtype=jnp.bfloat16, place=place)
    assert {leaf.dtype for leaf in jax.tree.leaves(low._params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = low._params["blocks"]["mlp"]["in"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    captions = json.loads(str(golden("pipelines")["captions"]))
    states = low.encode(captions, length=77).states
    expected = golden("pipelines")["if/states"]
    error = np.linalg.norm(states - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_folders_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="kind is 'sd'; expected one of sd15"):
        open_text_encoder(tmp_path, "sd")
    with pytest.raises(UserError, match="clip_skip is 1"):
        open_text_encoder(tmp_path, "flux", clip_skip=1)
    folder = pipeline(tmp_path, "pixart")
    (folder / "tokenizer").unlink()
    with pytest.raises(UserError, match="tokenizer: no such folder"):
        open_text_encoder(folder, "pixart")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer: holds no tokenizer"):
        open_text_encoder(folder, "pixart")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find(name) if name != "sentencepiece" else None
    )
    with pytest.raises(UserError, match=r"pip install 'diffjax\[sentencepiece\]'"):
        open_text_encoder(folder, "pixart")


def test_a_tokenizer_must_fit_its_network(tmp_path):
    folder = pipeline(tmp_path, "sd15")
    (folder / "tokenizer").unlink()
    shutil.copytree(TEXT / "tokenizer_clip", folder / "tokenizer")
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    vocab["zzz</w>"] = len(vocab)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=rf"tokenizer: the tokenizer has token {len(vocab) - 1}, but"):
        open_text_encoder(folder, "sd15")


def test_code_of_a_tokenizers_folder_is_not_run(tmp_path):
    shutil.copytree(TEXT / "tokenizer_t5", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["evil.Mine", None]}}
    path.write_text(json.dumps(config))
    (tmp_path / "tokenizer" / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nMine = None\n"
    )
    with pytest.raises(UserError, match=r"names a program or file of its own \(auto_map\), which is not run"):
        read_tokenizer(tmp_path / "tokenizer")
    assert not (tmp_path / "ran").exists()
