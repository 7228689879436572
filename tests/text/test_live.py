"""Captions encoded at the step that needs them: the same as the cache has."""

import dataclasses

import jax
import numpy as np
import pytest
from text_folders import pipeline

from diffjax.experiment import AddText
from diffjax.interop.text import load_minilm, open_text_encoder
from diffjax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from diffjax.text.cache import embed_captions
from diffjax.text.live import AddTokens, add_states

CAPTIONS = [
    "a red apple",
    "",
    "two cats on a mat, one of them asleep",
    "x",
    "blue bird",
    "a b c d",
    "sun",
    "moon",
]


WITHOUT = {"": (), "T5": ("text_encoder_3", "tokenizer_3")}


def encoder_of(kind, folder, mesh):
    if kind == "minilm":
        return load_minilm()
    kind, _, without = kind.partition(" without ")
    pipeline(folder, kind, WITHOUT[without])
    place = lambda shapes, axes: jax.tree.map(lambda _: replicated(mesh), shapes)  # noqa: E731
    return open_text_encoder(folder, kind, place=place)


def placed(elements, mesh):
    names = elements[0].keys()
    return put_batch({name: np.stack([element[name] for element in elements]) for name in names}, mesh)


@pytest.mark.parametrize("kind", ["minilm", "sdxl", "sd3", "sd3 without T5", "pixart"])
def test_each_device_encodes_its_own_captions_to_what_the_cache_has(kind, tmp_path):
    mesh = make_mesh()
    (tmp_path / "public").mkdir()
    encoder = encoder_of(kind, tmp_path / "public", mesh)
    length = 24 if kind.startswith("sd3") else 12
    table = embed_captions(encoder, CAPTIONS, length=length, cache_dir=tmp_path)
    for drop, zeros in ((0.0, False), (0.5, True)):
        cached = AddText(CAPTIONS, table, drop, zeros)
        live = AddTokens(CAPTIONS, encoder, length, drop, zeros)
        elements = [
            [add.random_map({"index": np.int32(i)}, np.random.default_rng(i)) for i in range(len(CAPTIONS))]
            for add in (cached, live)
        ]
        expected, tokens = placed(elements[0], mesh), placed(elements[1], mesh)
        with jax.transfer_guard("disallow"):
            found = add_states(encoder, tokens, batch_sharding(mesh), length=length)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.sharding == batch_sharding(mesh), name
            assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found["mask"], expected["mask"])
        np.testing.assert_allclose(found["text"], expected["text"], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(found["pooled"], expected["pooled"], rtol=1e-4, atol=1e-5)
        dropped = [not np.asarray(row).any() for row in found["pooled"]]
        assert any(dropped) == zeros


def test_what_is_dropped_is_the_empty_caption():
    encoder = dataclasses.make_dataclass("Encoder", [])()
    encoder.tokens = lambda captions, *, length: {"ids": np.array([[len(captions[0])] * length])}
    add = AddTokens(["abc"], encoder, 2, drop=0.5)
    ids = [add.random_map({"index": 0}, np.random.default_rng(i))["tokens/ids"].tolist() for i in range(64)]
    assert 16 < ids.count([0, 0]) < 48
    assert ids.count([0, 0]) + ids.count([3, 3]) == 64
