"""Latents that are encoded once, before training: what is cached, and when it is made anew."""

import json
import re

import numpy as np
import pytest
from latent_pictures import Pictures, cached, config_of, encoded, kept
from networks import golden_folder
from safetensors.numpy import load_file, save_file

from diffjax import latents as module
from diffjax.check_config import check_stage
from diffjax.data import latent_cache
from diffjax.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 4)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vae").mkdir()
    return golden_folder(tmp_path / "vae", "autoencoder_plain")


@pytest.mark.parametrize("flip", [False, True])
def test_moments_are_those_of_the_autoencoder(folder, flip):
    source, lines = Pictures(), []
    cache = cached(config_of(folder, flip=flip), source, lines.append)
    moments = kept(cache)
    expected = encoded(folder, source.images)
    if flip:
        turned = encoded(folder, source.images, mirrored=True)
        # The latents of a mirrored picture are not the mirrored latents of the picture.
        assert np.abs(turned - expected[:, :, :, ::-1]).max() > 0.01  # float16 is off by less than 1e-4
        expected = np.stack([expected, turned], axis=1)
    np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-4)
    assert len(lines) == 1
    assert "Encoding 10 pictures" in lines[0]
    assert str(cache.folder) in lines[0]
    assert cache.folder.name.startswith("random-train-8-")


def test_a_second_run_encodes_nothing(folder, monkeypatch):
    config = config_of(folder)
    first = kept(cached(config))
    monkeypatch.setattr(module, "_batch_encoder", None)
    lines = []
    np.testing.assert_array_equal(kept(cached(config, log=lines.append)), first)
    assert lines == []


def test_an_interrupted_run_goes_on_where_it_was(folder, monkeypatch):
    config, calls = config_of(folder), []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(config, check=check)
    [cache] = (folder.parent / "cache" / "latents").iterdir()
    complete = {path: path.stat() for path in cache.iterdir()}
    assert [path.name for path in sorted(complete)] == [f"0000{i}-of-00003.array_record" for i in range(2)]

    source, lines = Pictures(), []
    monkeypatch.setattr(module, "_LOOKED_AT", 10)  # all of them, once
    monkeypatch.setattr("diffjax.data.progress._SECONDS_PER_LINE", 0.0)
    whole = cached(config, source, lines.append)
    assert source.read == [*range(10), 8, 9]
    assert "Encoding 2 pictures" in lines[0]
    assert re.fullmatch(r"2 of 2 pictures encoded, [\d.]+ a second\.", lines[1])
    for path, before in complete.items():
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    np.testing.assert_allclose(kept(whole), encoded(folder, source.images), rtol=1e-3, atol=1e-4)


def test_a_damaged_shard_is_made_anew(folder):
    config, lines = config_of(folder), []
    cache = cached(config)
    first = kept(cache)
    cache.path(1).write_bytes(cache.path(1).read_bytes()[:-1000])
    np.testing.assert_array_equal(kept(cached(config, log=lines.append)), first)
    assert "00001-of-00003.array_record: cannot be read (damaged?)" in lines[0]
    assert "Encoding 4 pictures" in lines[1]


def test_whatever_changes_the_latents_has_a_cache_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(module, "_batch_encoder", lambda *_, **__: (pytest.fail, 8))
    monkeypatch.setattr(latent_cache.LatentCache, "write", lambda *_: None)
    monkeypatch.setattr(latent_cache.LatentCache, "open", lambda self, shard: True)
    config = config_of(folder)

    def place(config=config, source=None):
        return cached(config, source).folder

    first = place()
    assert place() == first
    places = [first, place(config_of(folder, flip=True)), place(source=Pictures(seed=1))]
    places += [place(source=Pictures(count=9))]
    renamed = Pictures()
    renamed.keys = [f"other/{key}" for key in renamed.keys]
    places.append(place(source=renamed))

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": "elsewhere"}))
    assert place() == first
    (folder / "config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    places.append(place())
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / WEIGHTS)
    name = "encoder.conv_in.bias"
    save_file({**weights, name: np.nextafter(weights[name], np.float32(9))}, folder / WEIGHTS)
    places.append(place())
    assert len(set(places)) == len(places) == 7


def test_processes_share_the_work_and_wait_for_each_other(folder, monkeypatch):
    config, waited = config_of(folder), []
    monkeypatch.setattr(module.multihost_utils, "sync_global_devices", waited.append)
    source = Pictures()
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    with pytest.raises(UserError, match="that they share") as caught:
        cached(config, source)
    assert "of 3 shards 2 cannot be read" in str(caught.value)
    monkeypatch.setattr(module.jax, "process_index", lambda: 0)
    lines = []
    cache = cached(config, source, log=lines.append)
    assert "Encoding 6 pictures" in lines[0]
    assert len(waited) == 2
    np.testing.assert_allclose(kept(cache), encoded(folder, source.images), rtol=1e-3, atol=1e-4)


def test_latents_that_float16_cannot_hold_are_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"scaling_factor": 1e6}))
    with pytest.raises(UserError, match="do not fit float16"):
        cached(config_of(folder))


def test_without_the_key_there_is_no_cache(folder):
    config = config_of(folder)
    config.latent.cache = False
    assert cached(config) is None


@pytest.mark.parametrize(
    ("changes", "words"), [({"latent.channels": 0}, "latent.cache needs latents"), ({"crop": 4}, "crop=4")]
)
def test_a_cache_that_cannot_be_is_refused(folder, changes, words):
    config = config_of(folder)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        check_stage(config)
