"""What the tests of encoded pictures share: pictures, a stage, and latents computed another way."""

import functools
from pathlib import Path

import jax
import numpy as np

from diffjax.config import stage_config
from diffjax.data.source import Example
from diffjax.experiment import build_stage
from diffjax.interop.autoencoder import FAMILIES
from diffjax.interop.model import open_network
from diffjax.latents import cache_latents

COUNT = 10
MODEL = {"name": "dit", "patch": 2, "embed": 16, "depth": 1, "heads": 2, "classes": 2, "scan": False}


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
