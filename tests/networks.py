"""What tests of networks share: random parameters, and golden cases of other libraries."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interop.model import open_network
from diffjax.nn.layers import unbox

GOLDEN = Path(__file__).parent / "golden"


def randomised(module, *examples, seed=0, scale=0.2):
    """Parameters of `module`, all of them random: what is initialised with zeros hides nothing."""
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), *examples)["params"])
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.0, scale, leaf.shape), leaf.dtype), shapes)


def num_params(module, *examples):
    """How many parameters `module` has; nothing is computed."""
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), *examples)["params"])
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def golden_folder(tmp_path, name, class_name="", stem="diffusion_pytorch_model"):
    """A checkpoint folder made of golden/NAME.json and golden/NAME.safetensors."""
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    if class_name:
        config["_class_name"] = class_name
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / f"{stem}.safetensors").write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
    return tmp_path


def golden_network(tmp_path, name, families, class_name="", stem="diffusion_pytorch_model"):
    """The network of a golden case with its parameters, and the case's arrays."""
    network = open_network(golden_folder(tmp_path, name, class_name, stem), families)
    return network, network.read(), dict(np.load(GOLDEN / f"{name}.npz"))


def relative_error(actual, expected):
    """The largest difference over the largest expected magnitude."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def channels_last(x):
    """NCHW to NHWC."""
    return np.moveaxis(np.asarray(x), 1, -1)
