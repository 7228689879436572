import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.parallel.mesh import make_mesh
from diffjax.training import digests

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint8, np.int32, np.uint32, bool)
SHAPES = ((), (1,), (7,), (16, 4), (8, 3, 2), (0, 3))


def array(shape, dtype, seed=0):
    bits = np.random.default_rng(seed).integers(
        0, 256, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8
    )
    if np.dtype(dtype) == bool:
        return bits[..., 0] > 127
    return bits.view(dtype)[..., 0]


def on_device(x):
    return digests.of_tree({"x": jnp.asarray(x)})["x"]


def by_hand(words):
    """The definition, a word at a time, in Python's integers."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    first = second = 0
    for i, word in enumerate(words):
        place = mix((i + 0x9E3779B9) % 2**32)
        lane = mix(word ^ place)
        first, second = (first + lane) % 2**32, (second + mix((lane + place) % 2**32)) % 2**32
    return f"{first:08x}{second:08x}"


def test_a_digest_is_what_its_definition_says():
    words = [0, 1, 2**31, 2**32 - 1, 12345]
    assert digests.of_numpy(np.array(words, np.uint32)) == by_hand(words)
    assert digests.of_numpy(np.array([3, 250], np.uint8)) == by_hand([3, 250])
    assert digests.of_numpy(np.array([2**40 + 7], np.uint64)) == by_hand([7, 2**8])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_and_the_device_agree(shape, dtype):
    x = array(shape, dtype)
    assert on_device(x) == digests.of_numpy(x)


def test_numpy_takes_an_array_in_pieces_as_it_takes_it_whole(monkeypatch):
    x = array((1000,), np.float32)
    whole = digests.of_numpy(x)
    monkeypatch.setattr(digests, "_CHUNK", 7)
    assert digests.of_numpy(x) == whole


@pytest.mark.parametrize(
    "spec", [(), ("data",), (None, "data"), (("data", "fsdp"),), ("fsdp", "data")], ids=str
)
def test_every_sharding_has_the_same_digest(spec):
    x = array((16, 8), np.float32)
    mesh = make_mesh(data=4, fsdp=2)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests.of_tree([placed]) == {"0": digests.of_numpy(x)}


def test_keys_of_random_numbers_have_digests():
    assert on_device(jax.random.key(3)) == digests.of_numpy(
        np.asarray(jax.random.key_data(jax.random.key(3)))
    )
    assert on_device(jax.random.key(3)) != on_device(jax.random.key(4))


def test_what_lies_in_the_memory_of_the_host_has_the_digest_it_has_on_the_device():
    x = array((16, 8), np.float32)
    place = NamedSharding(make_mesh(data=8), PartitionSpec("data"), memory_kind="pinned_host")
    assert digests.of_tree({"x": jax.device_put(x, place)}) == {"x": digests.of_numpy(x)}


@settings(max_examples=1000, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_flipped_bit_changes_the_digest(content, data):
    whole = np.frombuffer(content, np.uint8)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = whole.copy()
    flipped[bit // 8] ^= 1 << bit % 8
    for dtype in (np.uint8, np.uint16, np.uint32):
        size = len(content) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
        if bit < 8 * size:
            assert digests.of_numpy(whole[:size].view(dtype)) != digests.of_numpy(flipped[:size].view(dtype))


def test_signs_places_and_shifts_matter():
    # What a plain weighted sum misses: two signs that change together, and values that change places.
    x = np.arange(1, 101, dtype=np.float32)
    both = x.copy()
    both[[3, 50]] *= -1
    swapped = x.copy()
    swapped[[3, 50]] = swapped[[50, 3]]
    others = [x, both, swapped, np.roll(x, 1), -x, np.zeros_like(x), np.zeros(99, np.float32)]
    assert len({digests.of_numpy(other) for other in others}) == len(others)


def test_paths_are_names_and_numbers():
    tree = {"a": [jnp.zeros(1), {"b": jnp.zeros(2)}], "none": None}
    assert list(digests.flatten(tree)) == ["a/0", "a/1/b"]
