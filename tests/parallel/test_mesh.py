import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import AXES, batch_sharding, check_batch, make_mesh, put_batch, replicated


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1, 1)),
        ({"tensor": 4}, (2, 1, 4, 1)),
        ({"fsdp": 2, "tensor": 2, "context": 2}, (1, 2, 2, 2)),
    ],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == dict(zip(AXES, shape, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["mesh.data=3", "needs 3 devices", "there are 8"]),
        ({"data": 8, "fsdp": 2}, ["mesh.data=8", "mesh.fsdp=2", "needs 16 devices", "there are 8"]),
        ({"fsdp": 3}, ["mesh.fsdp=3", "there are 8"]),
        ({"fsdp": 16}, ["needs 16 devices", "there are 8"]),
        ({"fsdp": 0}, ["mesh.fsdp=0", "positive"]),
        ({"data": 0}, ["mesh.data=0", "positive"]),
        ({"data": -2}, ["mesh.data=-2", "positive"]),
        ({"tensor": 3}, ["mesh.tensor=3", "there are 8"]),
        ({"context": 0}, ["mesh.context=0", "positive"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(UserError) as error:
        make_mesh(**sizes)
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("size", "nearest"), [(12, 16), (11, 8), (3, 8), (0, 8), (-8, 8), (100, 96)])
def test_a_batch_that_does_not_divide_is_named_with_the_nearest_that_does(size, nearest):
    with pytest.raises(UserError, match=f"batch_size={size} .* 8 devices.* {nearest}\\.$"):
        check_batch(size, make_mesh(fsdp=2))
    check_batch(nearest, make_mesh(fsdp=2))


def test_accumulated_parts_of_a_batch_must_divide_too():
    check_batch(32, make_mesh(), accumulate=4)
    with pytest.raises(UserError, match=r"batch_size=40 .* 8 devices and 4 parts.* 32"):
        check_batch(40, make_mesh(), accumulate=4)


def test_devices_that_divide_examples_see_the_same_ones():
    mesh = make_mesh(fsdp=2, tensor=2)
    check_batch(4, mesh)
    placed = put_batch({"image": np.arange(4)}, mesh)["image"]
    assert [shard.data.tolist() for shard in placed.addressable_shards] == [[i // 2] for i in range(8)]


class FakeDevice:
    """A TPU chip of a slice: what meshes are made of."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4
        self.coords = (number % 2, number // 2 % 2, 0)


def test_only_the_data_axis_spans_slices():
    devices = [FakeDevice(number) for number in range(8)]
    mesh = make_mesh(fsdp=2, tensor=2, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.data=1 does not divide over 2 slices"):
        make_mesh(fsdp=8, devices=devices)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_batch_is_divided_over_all_devices(fsdp):
    mesh = make_mesh(fsdp=fsdp)
    image = np.arange(16 * 3).reshape(16, 3).astype(np.uint8)
    placed = put_batch({"image": image}, mesh)["image"]
    assert placed.sharding == batch_sharding(mesh)
    assert [shard.data.shape for shard in placed.addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(placed, image)


def test_replicated_is_a_whole_copy_everywhere():
    placed = jax.device_put(np.ones((4, 4)), replicated(make_mesh(fsdp=2)))
    assert replicated(make_mesh()).spec == PartitionSpec()
    assert [shard.data.shape for shard in placed.addressable_shards] == [(4, 4)] * 8
