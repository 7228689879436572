"""Convolutional networks whose features are compared, by the names of their published weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from diffjax.interop.rows import Row, Source, check, read_params, sources
from diffjax.interop.store import Store
from diffjax.nn.placement import unbox

# How names end that nothing needs: the bias of Inception's logits is left out.
_IGNORED = ("num_batches_tracked", "fc.bias")


def inception_name(path: str) -> str:
    """What pytorch-fid calls a layer of `models.inception`: "Mixed_5b.branch1x1.conv"."""
    return path.replace("/", ".")


def efficientnet_name(path: str) -> str:
    """What EfficientNet-PyTorch calls a layer of `models.efficientnet`: "_blocks.0._expand_conv"."""
    return "_" + path.replace("blocks_", "blocks.").replace("/", "._")


def lpips_name(path: str) -> str:
    """What torchvision and lpips call a layer of `models.lpips`: "features.0", "lin0.model.1"."""
    return re.sub(r"^(lin\d)$", r"\1.model.1", path.replace("features_", "features."))


def read_convnet(store: Store, table: Mapping[str, Source]) -> Any:
    """The parameters of a convolutional network, whose layers `convnet_table` has.

    Raises:
      UserError: tensors are missing, or not what the network needs.
    """
    check(store, table, lambda name: name.endswith(_IGNORED) or name.startswith("classifier."))
    return read_params(store, table)


def convnet_table(
    module: nn.Module, side: int, name: Callable[[str], str], *, pictures: int = 1
) -> dict[str, Source]:
    """Where the parameters of a convolutional network come from.

    Args:
      module: the network.
      side: of the pictures that it takes.
      name: what they call the layer that has a path here.
      pictures: how many batches of pictures it takes.
    """
    example = [jax.ShapeDtypeStruct((1, side, side, 3), "float32")] * pictures
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), *example)["params"])
    return sources(_rows(shapes, name), shapes)


def _rows(shapes: Any, name: Callable[[str], str]) -> list[Row]:
    """A row for each layer: its parameters tell what kind of one it is."""
    layers: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        layer, _, parameter = path.rpartition("/")
        layers.setdefault(layer, {})[parameter] = leaf
    rows = []
    for layer, leaves in layers.items():
        kind = "conv" if "kernel" in leaves and leaves["kernel"].ndim == 4 else "dense"
        rows.append(Row(name(layer), layer, "batch_norm" if "mean" in leaves else kind))
    return rows
