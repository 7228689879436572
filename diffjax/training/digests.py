"""Digests of arrays, computed where the arrays lie, and equal however they are sharded.

The bits of an element are a word of 32 (narrower ones are padded with zeros, wider ones are several words).
Each word is mixed with its position in the whole array, and the results are added modulo 2^32. Sums of
integers do not depend on their order, so every mesh gives the same, and so does numpy. The mixing is a
bijection of the word: a change of one word always changes the digest, and one of several words is missed
once in about 2^64 times. It guards against damage, not against people, who can find arrays of equal digests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.training.state import on_device

_CHUNK = 2**18  # words that numpy takes at a time


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `opt_state/0/mu/w`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def of_tree(tree: Any) -> dict[str, str]:
    """The digests of a tree's arrays by their paths, each of 16 hexadecimal digits.

    One compiled program reads all arrays where they are, and this function waits for it.

    Args:
      tree: a tree of `jax.Array`; of several processes, each must call this.
    """
    leaves = flatten(tree)
    if not leaves:
        return {}
    program = _program(tuple(leaf.sharding for leaf in leaves.values()))
    sums = np.asarray(program(list(leaves.values())))
    return {path: _hexadecimal(row) for path, row in zip(leaves, sums, strict=True)}


def of_numpy(array: np.ndarray) -> str:
    """The digest of one array on the host."""
    array = np.ascontiguousarray(array).reshape(-1)
    width = min(array.dtype.itemsize, 4)
    words = array.view(f"<u{width}")
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + chunk.size, dtype=np.uint64).astype(np.uint32)
        total += np.array([lane.sum(dtype=np.uint32) for lane in _lanes(chunk, index)], np.uint32)
    return _hexadecimal(total)


@functools.lru_cache(maxsize=32)
def _program(places: tuple[Any, ...]) -> Any:
    """Compiled for arrays that lie there: `[n arrays] -> uint32 [n, 2]`, which every process has in full."""
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    result = NamedSharding(meshes[0], PartitionSpec()) if meshes else None

    def run(arrays: list[jax.Array]) -> jax.Array:
        # What an optimizer keeps in the host's memory comes to the devices, as it does for an update.
        moved = [
            jax.device_put(array, on_device(place)) if place.memory_kind == "pinned_host" else array
            for array, place in zip(arrays, places, strict=True)
        ]
        return jnp.stack([_sums(array) for array in moved])

    return jax.jit(run, out_shardings=result)


def _sums(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # One reduction of two operands: of two with one each, the CPU's compiler makes slow loops.
    zero = jnp.uint32(0)
    lanes = jax.lax.reduce(
        _lanes(words, index), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim))
    )
    return jnp.stack(lanes)


def _lanes(words: Any, index: Any) -> tuple[Any, Any]:
    """Two sums' terms; each is a bijection of the word, at a given place."""
    place = _mix(index + np.uint32(0x9E3779B9))
    first = _mix(words ^ place)
    return first, _mix(first + place)


def _mix(x: Any) -> Any:
    """MurmurHash3's last step: a bijection, of which every bit depends on every bit of the input."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _hexadecimal(sums: np.ndarray) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"
