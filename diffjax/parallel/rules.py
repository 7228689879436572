"""Which logical axis lies on which mesh axis: the only place where both vocabularies meet."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None


class Rules(NamedTuple):
    """Mesh axes of each logical axis; None is replicated. A name that is missing here is an error."""

    batch: MeshAxes = BATCH_AXES
    length: MeshAxes = None
    height: MeshAxes = None
    width: MeshAxes = None
    channels: MeshAxes = None
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = None
    heads: MeshAxes = None
    head_dim: MeshAxes = None
    layers: MeshAxes = None
    patch: MeshAxes = None
    window: MeshAxes = None
    conv_in: MeshAxes = None
    conv_out: MeshAxes = "fsdp"
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
    """Placements of parameters.

    Args:
      mesh: the mesh.
      rules: the rules.
      shapes: a tree of `jax.ShapeDtypeStruct`.
      axes: the same tree with a tuple of logical axis names at each leaf.
      min_size: parameters of fewer elements are replicated; dividing them saves nothing.

    Raises:
      UserError: an axis does not divide.
    """

    def place(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        spec = rules.spec(names)
        if shape.size < min_size:
            return NamedSharding(mesh, PartitionSpec())
        for size, name, mesh_axis in zip(shape.shape, names, spec, strict=True):
            parts = _parts(mesh, mesh_axis)
            if size % parts:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path)} {shape.shape}: axis {name!r} of {size} does not "
                    f"divide over {parts} devices of mesh axis {mesh_axis!r}; "
                    f"{size - size % parts} or {size + parts - size % parts} would."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def _parts(mesh: Mesh, mesh_axis: MeshAxes) -> int:
    names = (mesh_axis,) if isinstance(mesh_axis, str) else (mesh_axis or ())
    parts = 1
    for name in names:
        parts *= mesh.shape[name]
    return parts
