"""What tests of networks share: random parameters, compiled functions, golden cases of other libraries."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from diffjax.interop.model import open_network
from diffjax.nn.placement import axis_rules, logical_axes, unbox
from diffjax.parallel.rules import Rules

GOLDEN = Path(__file__).parent / "golden"
# Ways to compute the same network.
WAYS = {
    "unrolled": {"scan": False},
    "remat": {"remat": "full"},
    "remat dots": {"remat": "dots"},
    "remat unrolled": {"remat": "full", "scan": False},
    "bfloat16": {"dtype": jnp.bfloat16},
}


def boxed_params(module, *examples):
    """The shapes of the parameters with their axis names, under the rules; nothing is computed."""
    with axis_rules(Rules().pairs()):
        return jax.eval_shape(module.init, jax.random.key(0), *examples)["params"]


def num_params(module, *examples):
    """How many parameters `module` has; nothing is computed."""
    return sum(leaf.size for leaf in jax.tree.leaves(unbox(boxed_params(module, *examples))))


def randomised(module, *examples, seed=0, scale=None):
    """Parameters of `module`, all of them random: what is initialised with zeros hides nothing.

    They are of size `scale`. By default activations stay moderate: kernels are small where many inputs are
    summed, and scales are about one.
    """
    return drawn(boxed_params(module, *examples), seed, scale)


def drawn(boxed, seed=0, scale=None):
    """As `randomised`, of `boxed_params`."""
    random = np.random.default_rng(seed)

    def draw(path, leaf, axes):
        name, mean, size = path[-1].key, 0.0, scale
        if scale is None:
            summed = [length for length, axis in zip(leaf.shape, axes, strict=True) if axis != "layers"][:-1]
            mean, size = float(name == "scale"), np.prod(summed) ** -0.5 if name == "kernel" else 0.3
        return jnp.asarray(random.normal(mean, size, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, unbox(boxed), logical_axes(boxed))


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A network small enough to be compiled in a second, and a batch of what it is told.

    Attributes:
      net: the network.
      inputs: the arguments of its `__call__`, of three examples.
      last: its last layer, where that begins with zeros, so that a new network predicts zero.
      gates: layers before it that begin with zeros.
      unused: how the paths of parameters end that no prediction depends on.
      ways: ways to compute the same, of `WAYS`, that are tried.
    """

    net: nn.Module
    inputs: tuple[Any, ...]
    last: str = ""
    gates: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    ways: tuple[str, ...] = ("unrolled", "remat", "bfloat16")

    @functools.cached_property
    def boxed(self):
        """See `boxed_params`."""
        return boxed_params(self.net, *self.inputs)

    @functools.cached_property
    def params(self):
        """See `randomised`."""
        return drawn(self.boxed)

    def __call__(self, *inputs, **params):
        """What the network makes of `inputs`, by default its own, with some `params` replaced."""
        return compiled(self.net)(self.params | params, *(inputs or self.inputs))

    def way(self, name):
        """The network that computes the same in this way."""
        return self.net.clone(**WAYS[name])

    def backward(self, *examples, way=None):
        """Outputs and gradients, see `backward`; of the outputs of these examples alone, if any are given."""
        net = self.way(way) if way else self.net
        chosen = np.isin(np.arange(3), examples or range(3))
        shapes = jax.eval_shape(compiled(self.net), self.params, *self.inputs)
        cotangents = [
            np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape) for y in jax.tree.leaves(shapes)
        ]
        for cotangent in cotangents:
            cotangent[~chosen] = 0.0
        return backward(net)(self.params, self.inputs, cotangents)

    def moved(self):
        """By the name of an input, all of them, that one with another second example."""
        leaves, tree = by_path(self.inputs)
        for path, leaf in leaves.items():
            # A shift of all features would vanish in a norm, so only the last of them moves.
            where = (1,) if leaf.ndim == 1 else (1, ..., -1)
            new = leaf.at[1, -1].set(~leaf[1, -1]) if leaf.dtype == bool else leaf.at[where].add(1)
            yield path, tree.unflatten((leaves | {path: new}).values())


@functools.cache
def compiled(net):
    """`(params, *inputs) -> outputs`, compiled once for all tests."""
    return jax.jit(lambda params, *inputs: net.apply({"params": params}, *inputs))


@functools.cache
def backward(net):
    """`(params, inputs, cotangents) -> outputs, gradients by parameters, gradients by inputs`, compiled once.

    Cotangents and outputs are lists; the gradients are by path.
    """

    def run(params, inputs, cotangents):
        leaves, tree = by_path(inputs)
        floats = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}

        def outputs(params, floats):
            given = tree.unflatten((leaves | floats).values())
            return jax.tree.leaves(net.apply({"params": params}, *given))

        out, pull = jax.vjp(outputs, params, floats)
        by_params, by_inputs = pull(cotangents)
        return out, flatten_dict(by_params, sep="/"), by_inputs

    return jax.jit(run)


def by_path(tree, is_leaf=None):
    """The leaves of a tree by their paths, in order, and its structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}, structure


def relative_error(actual, expected):
    """The largest difference over the largest expected magnitude."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def channels_last(x):
    """NCHW to NHWC."""
    return np.moveaxis(np.asarray(x), 1, -1)


def golden_folder(tmp_path, name, **changed):
    """A checkpoint folder: golden/NAME.safetensors and golden/NAME.json, with some settings changed."""
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    tensors = (GOLDEN / f"{name}.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(tensors)
    return tmp_path


def golden_network(tmp_path, name, families):
    """The network of a golden case with its parameters, and the case's arrays."""
    network = open_network(golden_folder(tmp_path, name), families)
    return network, network.read(), dict(np.load(GOLDEN / f"{name}.npz"))
