import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import batch_sharding, check_batch, make_mesh, put_batch, replicated


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (8, 1)), ({"fsdp": 2}, (4, 2)), ({"data": 2, "fsdp": 4}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8))],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
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
