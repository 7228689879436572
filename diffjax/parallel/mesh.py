"""The mesh of devices, and where a batch lives on it.

A mesh has four axes, of which any may be of size 1:

=========  =========================================================================================
axis       what is divided over it
=========  =========================================================================================
`data`     the batch; every part of it has a copy of the parameters
`fsdp`     the batch and the parameters, which are gathered where they are used (Rajbhandari et al.,
           2020: ZeRO-3; Zhao et al., 2023)
`tensor`   heads of attention and hidden widths of MLPs and residual blocks (Shoeybi et al., 2019)
`context`  tokens of a sequence, rows of a feature map
=========  =========================================================================================

Neighbours on the last axes are neighbours in the network. Where devices come in slices that a data centre's
network joins, only `data` spans slices.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      data: the size of this axis; -1 takes what is left.
      fsdp: the size of this axis.
      tensor: the size of this axis.
      context: the size of this axis.
      devices: other devices than those that JAX sees, such as those of a topology.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` not over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, rest = len(devices), {"fsdp": fsdp, "tensor": tensor, "context": context}
    given = ", ".join(f"mesh.{name}={size}" for name, size in {"data": data, **rest}.items() if size != 1)
    if min(rest.values()) < 1 or (data < 1 and data != -1):
        raise UserError(f"{given}: sizes must be positive (data may be -1).")
    others = math.prod(rest.values())
    if data == -1:
        data = max(count // others, 1)
    if data * others != count:
        raise UserError(
            f"{given} needs {data * others} devices, but there are {count}; set mesh.data=-1 to use them all."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(
            f"mesh.data={data} does not divide over {slices} slices; no other axis may span them."
        )
    sizes = (data, fsdp, tensor, context)
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        # An axis of the mesh need not be made of whole axes of the chips' torus: 16 of 8 x 8 x 8 is as good.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    inner = (data // slices, fsdp, tensor, context)
    grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=types)


def batch_parts(mesh: Mesh) -> int:
    """Over how many devices a batch is divided; those of `tensor` and `context` see the same examples."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, key: str = "batch_size", *, accumulate: int = 1) -> None:
    """Refuse a global batch that does not divide over the mesh, before anything is compiled.

    Args:
      batch_size: the number of examples of an update.
      mesh: the mesh.
      key: what the number is called.
      accumulate: parts of the batch whose gradients are added up one after the other.
    """
    parts = batch_parts(mesh) * accumulate
    if batch_size < 1 or batch_size % parts:
        near = max(parts, round(batch_size / parts) * parts)
        over = f"{batch_parts(mesh)} devices" + (f" and {accumulate} parts" if accumulate > 1 else "")
        raise UserError(f"{key}={batch_size} does not divide over {over}; the nearest that does is {near}.")


def batch_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, in rising order."""
    size = batch_size // batch_parts(mesh)
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in _parts_here(mesh)])


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's part of a global batch, its `batch_rows`, on its devices."""
    here, sharding = _parts_here(mesh), batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        size = len(array) // len(here)
        shape = (size * batch_parts(mesh), *array.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = here.index((index[0].start or 0) // size) * size
            return array[first : first + size]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(array) for name, array in batch.items()}


def _parts_here(mesh: Mesh) -> list[int]:
    """Which of the batch's parts the devices of this process hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_parts(mesh),))
    return sorted({(index[0].start or 0) for index in places.values() if index is not None})
