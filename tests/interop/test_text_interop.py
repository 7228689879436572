"""Text encoders of public folders against transformers and diffusers, and folders that mean harm."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop import bert, clip, t5
from diffjax.interop import text as interop_text
from diffjax.interop.model import open_network, write_network
from diffjax.interop.text import open_text_encoder, read_tokenizer
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.text.compose import SD3Text
from networks import GOLDEN, relative_error

TEXT = GOLDEN / "text"
FAMILIES = {**t5.FAMILIES, **clip.FAMILIES}
MODELS = ("clip_l", "clip_lp", "clip_g", "t5", "t5_relu")
GATED = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
# The parts of each pipeline's folder, of those in golden/text.
FOLDERS = {
    "sd15": {"text_encoder": "clip_l", "tokenizer": "tokenizer_clip"},
    "sdxl": {
        "text_encoder": "clip_l", "text_encoder_2": "clip_g",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_clip_g",
    },
    "sd3": {
        "text_encoder": "clip_lp", "text_encoder_2": "clip_g", "text_encoder_3": "t5",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_clip_g", "tokenizer_3": "tokenizer_t5",
    },
    "flux": {
        "text_encoder": "clip_l", "text_encoder_2": "t5",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_t5",
    },
    "pixart": {"text_encoder": "t5", "tokenizer": "tokenizer_t5"},
    "if": {"text_encoder": "t5", "tokenizer": "tokenizer_t5"},
}  # fmt: skip


def pipeline(folder, kind, without=()):
    """A pipeline's folder, of links."""
    for part, name in FOLDERS[kind].items():
        if part not in without:
            (folder / part).symlink_to(TEXT / name)
    return folder


@functools.cache
def golden(file):
    return dict(np.load(TEXT / f"{file}.npz"))


@functools.cache
def opened(name):
    network = open_network(TEXT / name, FAMILIES)
    return network, network.read()


@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_transformers(name):
    network, params = opened(name)
    arrays = {key.removeprefix(f"{name}/"): value for key, value in golden("models").items()}

    def run(params):
        apply = functools.partial(network.module.apply, {"params": params}, arrays["ids"])
        if name.startswith("t5"):
            out = {"states": apply(arrays["mask"]), "unmasked": apply()}
        else:
            last, penultimate = apply(), apply(skip=1)
            out = {"last": last.normed, "pooled": penultimate.pooled, "penultimate": penultimate.states}
        first = out["states" if name.startswith("t5") else "penultimate"]
        return jnp.sum(first * arrays.get("cotangent", 0.0)), out

    gradients, out = jax.jit(jax.grad(run, has_aux=True))(params)
    for key, value in out.items():
        assert relative_error(value, arrays[key]) < 1e-4, key
    checked = 0
    for path, source in network.sources().items() if hasattr(network, "sources") else table(network).items():
        leaf = functools.reduce(dict.__getitem__, path.split("/"), gradients)
        for i, tensor in enumerate(source.names()):
            for prefix in ("", "text_model."):
                if f"grad:{tensor}" in arrays and not prefix:
                    ours = source.to_theirs(np.asarray(leaf[i] if source.copies else leaf))
                    assert relative_error(ours, arrays[f"grad:{tensor}"]) < 1e-4, tensor
                    checked += 1
    assert checked == (3 if name in ("t5", "clip_g") else 0)
