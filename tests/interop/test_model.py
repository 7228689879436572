"""A network of a folder: opened, read and written; here a module of two layers, in place of a real one."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop.families import Family, number, require
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import Row
from diffjax.nn.layers import dense

STEM = "diffusion_pytorch_model"


class Tiny(nn.Module):
    """Two linear layers."""

    width: int

    @nn.compact
    def __call__(self, x):
        h = dense(self.width, name="first")(x)
        return dense(x.shape[-1], axes=("features", "embed"), name="second")(nn.relu(h))


def build(config, store):
    require(config, act_fn="relu")
    return Tiny(number(config, "width") // number(config, "parts", 1))


FAMILY = Family(
    name="TinyModel",
    library="diffusers",
    build=build,
    config=lambda module: {"width": module.width, "act_fn": "relu"},
    rows=lambda module: [Row("net.0", "first"), Row("net.2", "second")],
    example=lambda module: (jnp.zeros((1, 4)),),
    ignored=("position_ids",),
    aliases={"old.": "net."},
)
FAMILIES = {"TinyModel": FAMILY}


def tensors(width=8):
    random = np.random.default_rng(0)
    shapes = {
        "net.0.weight": (width, 4),
        "net.0.bias": (width,),
        "net.2.weight": (4, width),
        "net.2.bias": (4,),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, config, values, file=f"{STEM}.safetensors"):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(values, folder / file)
    return folder


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_read_and_written_bit_for_bit(tmp_path, library):
    stem = STEM if library == "diffusers" else "model"
    kind = {"_class_name": "TinyModel"} if library == "diffusers" else {"architectures": ["TinyModel"]}
    family = FAMILY._replace(library=library)
    theirs = tensors()
    write(tmp_path, {**kind, "width": 8}, theirs | {"position_ids": np.zeros(3)}, f"{stem}.safetensors")
    network = open_network(tmp_path, {"TinyModel": family})
    params = network.read()
    x = np.ones((2, 4), np.float32)
    h = np.maximum(x @ theirs["net.0.weight"].T + theirs["net.0.bias"], 0.0)
    expected = h @ theirs["net.2.weight"].T + theirs["net.2.bias"]
    np.testing.assert_allclose(network.module.apply({"params": params}, x), expected, rtol=1e-5)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), network.shapes)
    assert network.axes["first"]["kernel"] == ("embed", "features")

    for max_bytes in (10**9, 100):
        folder = tmp_path / str(max_bytes)
        write_network(folder, family, network.module, params, max_bytes=max_bytes)
        assert json.loads((folder / "config.json").read_text()) == {**kind, "width": 8, "act_fn": "relu"}
        found = {}
        for file in folder.glob(f"{stem}*.safetensors"):
            found |= load_file(file)
        assert found.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert found[name].tobytes() == tensor.tobytes()
        again = open_network(folder, {"TinyModel": family}).read()
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_old_names_and_half_precision(tmp_path):
    old = {name.replace("net.", "old."): tensor.astype(np.float16) for name, tensor in tensors().items()}
    write(tmp_path, {"_class_name": "TinyModel", "width": 8}, old, f"{STEM}.fp16.safetensors")
    params = open_network(tmp_path, FAMILIES).read(dtype=jnp.bfloat16)
    expected = tensors()["net.2.bias"].astype(np.float16).astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["second"]["bias"], expected)
    both = old | {"net.0.bias": np.zeros(8, np.float16)}
    write(tmp_path, {"_class_name": "TinyModel", "width": 8}, both, f"{STEM}.fp16.safetensors")
    with pytest.raises(UserError, match=r"tensor (old|net)\.0\.bias is there twice"):
        open_network(tmp_path, FAMILIES)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """A network of millions of parameters, of which the header alone is there."""
    width = 2**20
    header = {
        "net.0.weight": [width, 4],
        "net.0.bias": [width],
        "net.2.weight": [4, width],
        "net.2.bias": [4],
    }
    entries, at = {}, 0
    for name, shape in header.items():
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    with open(tmp_path / f"{STEM}.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # the rest is a hole
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "TinyModel", "width": width}))
    network = open_network(tmp_path, FAMILIES)
    assert network.shapes["first"]["kernel"].shape == (4, width)
    assert network.store.read("net.2.weight", (slice(3, 4), slice(width - 2, width))).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is of a 'None'; supported are TinyModel"),
        ({"_class_name": "Other"}, "is of a 'Other'; supported are TinyModel"),
        ({"_class_name": {"a": 1}}, "is of a .*; supported are TinyModel"),
        ({"architectures": 3}, "is of a 'None'"),
        ({"architectures": []}, "is of a 'None'"),
        ({"architectures": [None]}, "is of a 'None'"),
        ({"_class_name": "TinyModel"}, "width is None; expected a whole number from 1"),
        ({"_class_name": "TinyModel", "width": 0}, "width is 0; expected a whole number from 1"),
        ({"_class_name": "TinyModel", "width": True}, "width is True"),
        ({"_class_name": "TinyModel", "width": 8.0}, "width is 8.0"),
        ({"_class_name": "TinyModel", "width": "8"}, "width is '8'"),
        ({"_class_name": "TinyModel", "width": 10**30}, "width is 1000.*; expected a whole number from 1 to"),
        (
            {"_class_name": "TinyModel", "width": 8, "act_fn": "gelu"},
            "act_fn is 'gelu', which is not supported",
        ),
        ({"_class_name": "TinyModel", "width": 8, "parts": 9}, "its sizes make no network"),
    ],
)
def test_configurations_that_make_no_network(tmp_path, config, message):
    write(tmp_path, config, tensors())
    with pytest.raises(UserError, match=message):
        open_network(tmp_path, FAMILIES)


def test_folders_that_hold_no_network(tmp_path):
    with pytest.raises(
        UserError, match=r"has no config.json; expected a folder of diffusers or transformers"
    ):
        open_network(tmp_path, FAMILIES)
    (tmp_path / "config.json").write_text('{"_class_name": "TinyModel", "width": 8}')
    with pytest.raises(UserError, match="holds no weights"):
        open_network(tmp_path, FAMILIES)
    write(tmp_path, {"_class_name": "TinyModel", "width": 16}, tensors())
    network = open_network(tmp_path, FAMILIES)
    with pytest.raises(UserError, match=r"mis-shaped: net.0.bias has shape \(8,\), expected \(16,\)"):
        network.read()
