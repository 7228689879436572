"""Which logical axis lies on which mesh axis: the only place where both vocabularies meet."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.nn.kernels import use_kernel
from diffjax.nn.placement import axis_rules
from diffjax.parallel.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None

STACKED = "layers"  # the axis over which blocks are scanned: each block must be whole when its turn comes


class Rules(NamedTuple):
    """Mesh axes of each logical axis; None is replicated. A name that is missing here is an error.

    They place activations, and the part of parameters that tensor parallelism divides; `param_shardings` adds
    `fsdp` to the latter.
    """

    batch: MeshAxes = BATCH_AXES
    length: MeshAxes = "context"
    height: MeshAxes = "context"
    width: MeshAxes = None
    channels: MeshAxes = None
    embed: MeshAxes = None
    features: MeshAxes = None
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    layers: MeshAxes = None
    patch: MeshAxes = None
    window: MeshAxes = None
    conv_in: MeshAxes = None
    conv_hidden: MeshAxes = "tensor"
    conv_out: MeshAxes = None
    vocab: MeshAxes = None
    one: MeshAxes = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The placement of an array with these logical axes."""
        return PartitionSpec(*(None if axis is None else self._lookup(axis) for axis in axes))

    def _lookup(self, axis: str) -> MeshAxes:
        if axis not in self._fields:
            raise ValueError(f"logical axis {axis!r} has no rule; there are {', '.join(self._fields)}")
        return getattr(self, axis)

    def pairs(self) -> list[tuple[str, MeshAxes]]:
        """The rules as Flax's `logical_axis_rules` wants them, for activations."""
        return list(self._asdict().items())


def param_shardings(mesh: Mesh, rules: Rules, shapes: Any, axes: Any, *, min_size: int = 2**14) -> Any:
    """Placements of parameters: tensor parallelism where the rules say so, and FSDP.

    FSDP divides the largest axis that is left and divides; over the devices of `tensor` too, where tensor
    parallelism has no use for them. Stacked blocks stay together.

    Args:
      mesh: the mesh.
      rules: the rules.
      shapes: a tree of `jax.ShapeDtypeStruct`.
      axes: the same tree with a tuple of logical axis names at each leaf.
      min_size: parameters of fewer elements (each block of a stack for itself) are replicated; dividing them
        saves nothing.

    Raises:
      UserError: an axis does not divide.
    """

    def place(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        spec = [each if _parts(mesh, each) > 1 else None for each in rules.spec(names)]
        own = math.prod(size for size, name in zip(shape.shape, names, strict=True) if name != STACKED)
        if own < min_size:
            return NamedSharding(mesh, PartitionSpec())
        what = f"parameter {jax.tree_util.keystr(path)} {shape.shape}"
        for size, name, mesh_axes in zip(shape.shape, names, spec, strict=True):
            parts = _parts(mesh, mesh_axes)
            if size % parts:
                raise UserError(_does_not_divide(what, name, size, parts, mesh_axes))
        rest = [i for i, name in enumerate(names) if name != STACKED and spec[i] is None]
        if not rest or _parts(mesh, "fsdp") * _parts(mesh, "tensor") == 1:
            return NamedSharding(mesh, PartitionSpec(*spec))
        rest.sort(key=lambda i: shape.shape[i], reverse=True)
        idle = not any(spec) and _parts(mesh, "tensor") > 1
        for mesh_axes in (("fsdp", "tensor"), "fsdp") if idle else ("fsdp",):
            parts = _parts(mesh, mesh_axes)
            for i in rest:
                if shape.shape[i] % parts == 0:
                    spec[i] = mesh_axes
                    return NamedSharding(mesh, PartitionSpec(*spec))
        largest = rest[0]
        raise UserError(_does_not_divide(what, names[largest], shape.shape[largest], parts, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def _does_not_divide(what: str, name: str | None, size: int, parts: int, mesh_axes: MeshAxes) -> str:
    near = f"{size - size % parts} or {size + parts - size % parts}" if size > parts else f"{parts}"
    return (
        f"{what}: axis {name!r} of {size} does not divide over {parts} devices of mesh axis {mesh_axes!r}; "
        f"{near} would."
    )


def _parts(mesh: Mesh, mesh_axes: MeshAxes) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
    # Meshes of other programs may lack an axis.
    return math.prod(mesh.shape.get(name, 1) for name in names)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, attention: str = "auto") -> Iterator[None]:
    """Within it, programs are compiled for a mesh, its rules for activations, and a kernel for attention.

    Args:
      mesh: the mesh.
      attention: one of `diffjax.nn.kernels.KERNELS`, or "auto".

    Raises:
      UserError: there is no such kernel.
    """
    with jax.set_mesh(mesh), axis_rules(Rules().pairs()), use_kernel(attention):
        yield
