"""The mesh of devices, and where a batch lives on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError

AXES = ("data", "fsdp")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      data: copies of the parameters that each see a part of the batch; -1 takes what is left.
      fsdp: devices over which each copy of the parameters is divided (they divide the batch too).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: sizes must be positive (data may be -1).")
    if data == -1:
        data = max(devices // fsdp, 1)
    if data * fsdp != devices:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {data * fsdp} devices, but there are {devices}; "
            "set mesh.data=-1 to use them all."
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch: divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, key: str = "batch_size") -> None:
    """Refuse a global batch that does not divide over the mesh, before anything is compiled."""
    if batch_size < 1 or batch_size % mesh.size:
        near = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise UserError(
            f"{key}={batch_size} does not divide over {mesh.size} devices; the nearest that does is {near}."
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's part of a global batch on its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
