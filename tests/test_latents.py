"""Latents that are encoded once, before training, against those that are encoded at every step."""

import dataclasses
import functools
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import golden_folder
from safetensors.numpy import load_file, save_file

from diffjax import latents as module
from diffjax import train as trains
from diffjax.config import check_stage, stage_config
from diffjax.data import latent_cache
from diffjax.data.source import Example
from diffjax.errors import UserError
from diffjax.experiment import build_loader, build_stage
from diffjax.interop.autoencoder import FAMILIES
from diffjax.interop.model import open_network
from diffjax.latents import cache_latents, draw, open_codec
from diffjax.models.autoencoder import Autoencoder, Gaussian
from diffjax.parallel.mesh import make_mesh, put_batch
from diffjax.text.encoder import TextStates

COUNT = 10
MODEL = {"name": "dit", "patch": 2, "embed": 16, "depth": 1, "heads": 2, "classes": 2, "scan": False}
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Pictures:
    """Random pictures of 16 px."""

    name, resolution, classes = "random/train", 16, ("a", "b")

    def __init__(self, count=COUNT, seed=0):
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        self.keys = self.captions = self.concepts = self.styles = [f"{i}.png" for i in range(count)]
        self.labels = [i % 2 for i in range(count)]
        self.read = []

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        self.read.append(i)
        return Example(self.images[i], self.captions[i], self.keys[i], "", "")


class Table:
    """Stands for encoded captions; the empty caption has no tokens."""

    def lookup(self, caption):
        real = np.full(1, caption != "")
        return TextStates(np.ones((1, 2), np.float16), real, np.ones(2, np.float32))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 4)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vae").mkdir()
    return golden_folder(tmp_path / "vae", "autoencoder_plain")


def config_of(folder, *, flip=False):
    """A stage of 8 px in the latents of that autoencoder."""
    config = stage_config()
    config.latent.update(channels=2, scale=2, folder=str(folder), cache=True)
    config.data.update(cache_dir=str(folder.parent / "cache"), resolution=16, flip=flip, num_threads=2)
    config.resolution, config.batch_size = 8, 8
    config.conditions, config.model = ("label",), {**MODEL, "text": ""}
    return config


@functools.cache
def stage_of():
    config = config_of(Path("nowhere"))
    return build_stage(config).stage


def cached(config, source=None, log=None, **settings):
    return cache_latents(config, stage_of(), source or Pictures(), log=log, **settings)


def encoded(folder, images, *, mirrored=False):
    """Means and deviations by the autoencoder itself, of pictures brought to 8 px: `[n, 2, h, w, c]`."""
    network = open_network(folder, FAMILIES)
    net, params = network.module, network.read()
    x = np.rint(images.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4))) / 127.5 - 1.0
    run = jax.jit(lambda x: net.apply({"params": params}, x, method="moments"))
    moments = run(x[:, :, ::-1] if mirrored else x)
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    scale = net.scaling_factor / np.array(net.latents_std)
    return np.stack([(mean - net.latents_mean) * scale, scale * np.exp(logvar / 2)], axis=1)


def kept(cache):
    return np.stack([cache[i] for i in range(len(cache))]).astype(np.float64)


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
    monkeypatch.setattr(module, "_SECONDS_PER_LINE", 0.0)
    whole = cached(config, source, lines.append)
    assert source.read == [*range(10), 8, 9]
    assert "Encoding 2 pictures" in lines[0]
    assert re.fullmatch(r"2 of 2 pictures encoded, [\d.]+ a second\.", lines[1])
    for path, before in complete.items():
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    np.testing.assert_allclose(kept(whole), encoded(folder, source.images), rtol=1e-3, atol=1e-4)


def test_a_signal_ends_the_encoding_within_training(folder, tmp_path, monkeypatch):
    class Stopping(Pictures):
        def __getitem__(self, i):
            if len(self.read) == COUNT + 5:  # each was looked at for the fingerprint, and a shard is encoded
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(i)

    monkeypatch.setattr(trains, "build_source", lambda *_, **__: Stopping())
    with pytest.raises(trains.Interrupted, match="SIGTERM while pictures were encoded"):
        trains.train(config_of(folder), tmp_path / "run")
    shards = list((folder.parent / "cache" / "latents").glob("*/*"))
    assert [path.name for path in shards] == ["00000-of-00003.array_record"]


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


def test_drawn_latents_have_the_distribution_of_those_that_are_encoded_at_each_step(folder):
    config, source = config_of(folder), Pictures(8)
    mesh = make_mesh()
    codec = open_codec(config, stage_of(), mesh)
    cache = cached(config, source)
    moments = put_batch({"moments": np.stack([cache[i] for i in range(8)])}, mesh)["moments"]
    pixels = source.images.reshape(8, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    pixels = put_batch({"image": np.rint(pixels).astype(np.uint8)}, mesh)["image"]
    key = jax.random.key(0)
    # One key draws one and the same noise, so that both are equal but for float16.
    np.testing.assert_allclose(draw(moments, key), codec.encode(pixels, key), rtol=1e-3, atol=2e-3)
    keys = jax.random.split(key, 400)
    draws = np.asarray(jax.jit(jax.vmap(draw, (None, 0)))(moments, keys))
    mean, std = encoded(folder, source.images).swapaxes(0, 1)
    assert np.abs((draws.mean(0) - mean) / std).max() < 5 / 20
    assert np.abs(draws.std(0) / std - 1).max() < 5 / np.sqrt(800)


def test_the_loader_gives_the_same_pictures_captions_and_mirror_images(folder):
    config = config_of(folder, flip=True)
    config.conditions = ("text", "label")
    config.text.update(drop=0.5, null="empty")
    source = Pictures()
    cache = cached(config, source)
    moments, turned = encoded(folder, source.images), encoded(folder, source.images, mirrored=True)
    loaders = [build_loader(config, source, Table(), latents) for latents in (None, cache)]
    mirrored = []
    for _ in range(4):
        of_images, of_moments = (next(loader) for loader in loaders)
        assert "image" not in of_moments
        for name in ("index", "label", "mask"):
            np.testing.assert_array_equal(of_images[name], of_moments[name])
        small = source.images.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4))
        for image, i, found in zip(
            of_images["image"], of_images["index"], of_moments["moments"], strict=True
        ):
            mirrored.append(not np.array_equal(image, np.rint(small[i])))
            expected = turned[i] if mirrored[-1] else moments[i]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert 8 < sum(mirrored) < 24
    for loader in loaders:
        loader.close()
    undecoded = Pictures()
    alone = build_loader(config, undecoded, Table(), cache)
    next(alone)
    alone.close()
    assert undecoded.read == []


def test_training_is_the_same_where_the_autoencoder_is_certain(folder, tmp_path, monkeypatch):
    # Latents that float16 holds exactly, and that do not depend on what else is in a batch.
    real = Autoencoder.encode

    def encode(self, x):
        real(self, x)  # it has parameters to be read
        mean = jnp.floor(64 * x[:, ::2, ::2, :2]) / 64
        return Gaussian(mean, jnp.full(mean.shape, -jnp.inf))

    monkeypatch.setattr(Autoencoder, "encode", encode)
    monkeypatch.setattr(trains, "build_source", lambda *_, **__: Pictures())
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"scaling_factor": 0.5, "latents_mean": None, "latents_std": None}
    (folder / "config.json").write_text(json.dumps(settings))
    given = {False: [], True: []}
    compiled, opened = trains.compile_train_step, trains.open_codec

    def guarded(function):
        def call(*arguments):
            with jax.transfer_guard("disallow"):  # nothing moves between host and devices by itself
                return function(*arguments)

        return call

    def codec_of(*arguments):
        codec = opened(*arguments)
        return codec and dataclasses.replace(codec, encode=guarded(codec.encode))

    monkeypatch.setattr(trains, "open_codec", codec_of)
    monkeypatch.setattr(trains, "draw", guarded(trains.draw))

    def recording(cache, *args):
        update = compiled(*args)

        def run(state, batch, key):
            given[cache].append({name: np.asarray(array) for name, array in batch.items()})
            return guarded(update)(state, batch, key) if cache else (state, {"loss": jnp.zeros(())})

        return run

    monkeypatch.setattr(trains.Checkpoints, "save", lambda *_: None)  # it takes seconds
    for cache in (False, True):
        config = config_of(folder)
        config.latent.cache = cache
        config.steps = config.checkpoint.every = 3
        config.preview.every = 0
        monkeypatch.setattr(trains, "compile_train_step", functools.partial(recording, cache))
        trains.train(config, tmp_path / str(cache))
    assert len(given[False]) == len(given[True]) == 3
    for one, other in zip(*given.values(), strict=True):
        assert one.keys() == other.keys() == {"latent", "label"}
        assert one["latent"].std() > 0.1
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


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
