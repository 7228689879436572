"""Adam whose moments take fewer bits: bfloat16, or eight bits in blocks.

Rounding to the nearest value would lose what a step changes: with `b2 = 0.999` the second moment falls by a
thousandth, and the next bfloat16 is four times as far away. So both moments are rounded at random, up or down
in such proportion that the expected value is right, by a key that the step number gives.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 64
# Parameters of fewer elements keep float32, as in Dettmers et al., 2022.
MIN_SIZE = 4096


class Blocks(NamedTuple):
    """Numbers of eight bits; a block of the last axis shares a scale.

    Attributes:
      codes: int8 or uint8, of the shape of what they stand for.
      scales: float32, one for each block: the last axis is shorter, the others are the same.
    """

    codes: jax.Array
    scales: jax.Array


class Codec(NamedTuple):
    """How a moment is kept.

    Attributes:
      pack: `(float32 array, key) -> array or Blocks`.
      unpack: the reverse.
    """

    pack: Callable[[jax.Array, jax.Array], Any]
    unpack: Callable[[Any], jax.Array]


def scale_by_adam(*, b1: float, b2: float, moments: str) -> optax.GradientTransformation:
    """Adam's direction (`optax.scale_by_adam`) with moments of fewer bits.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      moments: a key of `CODECS`: for each parameter "bfloat16" keeps 4 bytes and "int8" 2 and an eighth, in
        place of 8.
    """
    adam, (first, second) = optax.scale_by_adam(b1, b2), CODECS[moments]

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (
            jax.tree.map(lambda leaf, codec=codec: _zeros(codec, leaf), params) for codec in (first, second)
        )
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        wide = optax.ScaleByAdamState(state.count, _unpacked(first, state.mu), _unpacked(second, state.nu))
        updates, new = adam.update(grads, wide, params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
        mu, nu = _packed(first, new.mu, keys[0]), _packed(second, new.nu, keys[1])
        return updates, optax.ScaleByAdamState(new.count, mu, nu)

    return optax.GradientTransformation(init, update)


def is_blocks(x: Any) -> bool:
    """Whether this is one parameter's moment, of two arrays."""
    return isinstance(x, Blocks)


def round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to one of the two nearest bfloat16, of expected value `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32: the lower half is the chance of going up.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def pack_signed(x: jax.Array, key: jax.Array) -> jax.Array | Blocks:
    """To evenly spaced codes, from -127 to 127 times the scale."""
    if _is_small(x):
        return x
    blocks = _in_blocks(x)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / 127.0
    ratio = blocks / _nonzero(scales)[..., None]
    codes = jnp.floor(ratio + jax.random.uniform(key, ratio.shape))
    return Blocks(jnp.clip(codes, -127, 127).astype(jnp.int8).reshape(x.shape), scales)


def pack_squares(x: jax.Array, key: jax.Array) -> jax.Array | Blocks:
    """What is not negative to codes whose squares count, from 1 to 255: so a root of it can be divided by."""
    if _is_small(x):
        return x
    blocks = _in_blocks(x)
    scales = jnp.max(blocks, axis=-1) / 255.0**2
    ratio = blocks / _nonzero(scales)[..., None]
    low = jnp.floor(jnp.sqrt(ratio))
    # The chance that makes the expected square right.
    up = jax.random.uniform(key, ratio.shape) * (2.0 * low + 1.0) < ratio - low**2
    return Blocks(jnp.clip(low + up, 1, 255).astype(jnp.uint8).reshape(x.shape), scales)


def unpack(kept: jax.Array | Blocks) -> jax.Array:
    """To float32, what `pack_signed` or `round_to_bfloat16` made."""
    return _times_scales(kept, lambda codes: codes) if isinstance(kept, Blocks) else kept.astype(jnp.float32)


def unpack_squares(kept: jax.Array | Blocks) -> jax.Array:
    """To float32, what `pack_squares` made."""
    return _times_scales(kept, jnp.square) if isinstance(kept, Blocks) else kept


def block_size(shape: tuple[int, ...]) -> int:
    """How many values of the last axis share a scale: up to 64, or all of them where 16 do not divide it.

    Blocks are so short that they seldom lie across the border between two devices.
    """
    divisor = math.gcd(shape[-1], BLOCK)
    return divisor if divisor >= 16 else shape[-1]


def _is_small(x: jax.Array) -> bool:
    return x.ndim == 0 or x.size < MIN_SIZE


def _in_blocks(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, block_size(x.shape))


def _times_scales(kept: Blocks, value: Callable[[jax.Array], jax.Array]) -> jax.Array:
    blocks = value(_in_blocks(kept.codes).astype(jnp.float32)) * kept.scales[..., None]
    return blocks.reshape(kept.codes.shape)


def _nonzero(scales: jax.Array) -> jax.Array:
    return jnp.where(scales > 0.0, scales, 1.0)


def _zeros(codec: Codec, leaf: jax.Array) -> Any:
    kept = jax.eval_shape(codec.pack, jax.ShapeDtypeStruct(leaf.shape, jnp.float32), jax.random.key(0))
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), kept)


def _packed(codec: Codec, tree: Any, key: jax.Array) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    kept = [codec.pack(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, kept)


def _unpacked(codec: Codec, tree: Any) -> Any:
    return jax.tree.map(codec.unpack, tree, is_leaf=is_blocks)


CODECS: dict[str, tuple[Codec, Codec]] = {
    "bfloat16": (Codec(round_to_bfloat16, unpack), Codec(round_to_bfloat16, unpack)),
    "int8": (Codec(pack_signed, unpack), Codec(pack_squares, unpack_squares)),
}
"""Of the first moment and of the second."""
