"""Where activations lie on a mesh, and what the axes of parameters mean, by logical names."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

# Rows of a feature map on a device, at least, if they are divided: dividing fewer saves nothing, and of one
# row on each device XLA (of jax 0.10, on CPUs at least) computes wrong gradients of a 3x3 convolution.
MIN_ROWS = 4


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the layout of an activation by logical axis names; does nothing outside a mesh.

    An axis that does not divide over its devices, such as a batch of one, is whole on each of them; so are
    the few rows of small feature maps.

    Raises:
      ValueError: a name has no rule; Flax would silently replicate that axis.
    """
    known = {name for name, _ in nn.get_logical_axis_rules()}
    unknown = [axis for axis in axes if known and axis is not None and axis not in known]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule; there are {', '.join(sorted(known))}")
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes:
        return x
    spec: list[tuple[str, ...] | None] = []
    for size, axis, names in zip(x.shape, axes, mesh_axes(*axes), strict=False):
        present = tuple(name for name in names if name in sizes)
        parts = math.prod(sizes[name] for name in present)
        whole = size % parts or (axis == "height" and size < MIN_ROWS * parts)
        spec.append(None if whole else present)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def mesh_axes(*axes: str | None) -> list[tuple[str, ...]]:
    """Over which mesh axes the rules that `axis_rules` has set divide each of these logical axes."""
    spec = nn.logical_to_mesh_axes(axes, nn.get_logical_axis_rules()) or ()
    return [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]


def on_one_device() -> bool:
    """Whether there is no mesh, or only one of a single device."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) == 1


def num_parts(axis: str) -> int:
    """Over how many devices of the mesh, if there is one, a logical axis is divided."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for names in mesh_axes(axis) for name in names)


def logical_axes(boxed: Any) -> Any:
    """The axis names of freshly initialised parameters: the same tree, a tuple of names at each leaf."""

    def names(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return tuple(leaf.names)
        return (None,) * leaf.ndim

    return jax.tree.map(names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def unbox(boxed: Any) -> Any:
    """Freshly initialised parameters without their axis names."""
    return nn.meta.unbox(boxed)


def axis_rules(pairs: Sequence[tuple[str, Any]]) -> Any:
    """A context in which `constrain` knows where each logical axis lies; see `diffjax.parallel.rules`."""
    return nn.logical_axis_rules(pairs)
