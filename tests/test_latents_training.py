"""Training with latents that were encoded once, against those that are encoded at every step."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_pictures import COUNT, Pictures, cached, config_of, encoded, stage_of
from networks import golden_folder
from transfers import guarded

from diffjax import run as runs
from diffjax.data import latent_cache
from diffjax.experiment import build_loader
from diffjax.latents import draw, open_codec
from diffjax.models.autoencoder import Autoencoder, Gaussian
from diffjax.parallel.mesh import make_mesh, put_batch
from diffjax.text.encoder import TextStates
from diffjax.train import train
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.interrupt import Interrupted


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


def test_a_signal_ends_the_encoding_within_training(folder, tmp_path, monkeypatch):
    class Stopping(Pictures):
        def __getitem__(self, i):
            # Each was decoded for the check, and looked at for the fingerprint; two shards are read.
            if len(self.read) == 2 * COUNT + 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(i)

    monkeypatch.setattr(runs, "build_source", lambda *_, **__: Stopping())
    with pytest.raises(Interrupted, match="SIGTERM: train: stopped before its first step"):
        train(config_of(folder), tmp_path / "run")
    shards = sorted((folder.parent / "cache" / "latents").glob("*/*"))
    # What is complete stays, and nothing else is left over.
    complete = ["00000-of-00003.array_record", "00001-of-00003.array_record"]
    assert [path.name for path in shards] in (complete[:1], complete)


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
    monkeypatch.setattr(runs, "build_source", lambda *_, **__: Pictures())
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"scaling_factor": 0.5, "latents_mean": None, "latents_std": None}
    (folder / "config.json").write_text(json.dumps(settings))
    given = {False: [], True: []}
    compiled, opened = runs.compile_train_step, runs.open_codec

    def codec_of(*arguments):
        codec = opened(*arguments)
        return codec and dataclasses.replace(codec, encode=guarded(codec.encode))

    monkeypatch.setattr(runs, "open_codec", codec_of)
    monkeypatch.setattr(runs, "draw", guarded(runs.draw))

    def recording(cache, *args):
        update = compiled(*args)

        def run(state, batch, key):
            given[cache].append({name: np.asarray(array) for name, array in batch.items()})
            zero = {"loss": jnp.zeros(()), "skipped": jnp.zeros(())}
            return guarded(update)(state, batch, key) if cache else (state, zero)

        return run

    monkeypatch.setattr(Checkpoints, "save", lambda *_, **__: None)  # it takes seconds
    for cache in (False, True):
        config = config_of(folder)
        config.latent.cache = cache
        config.steps = config.checkpoint.every = 3
        config.preview.every = 0
        monkeypatch.setattr(runs, "compile_train_step", functools.partial(recording, cache))
        train(config, tmp_path / str(cache))
    assert len(given[False]) == len(given[True]) == 3
    for one, other in zip(*given.values(), strict=True):
        assert one.keys() == other.keys() == {"latent", "label"}
        assert one["latent"].std() > 0.1
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
