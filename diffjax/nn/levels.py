"""The levels of a U-Net, whose blocks are equal but for those at its ends."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.repeat import once, repeat


def descend(
    make: Callable[[str], nn.Module],
    count: int,
    h: jax.Array,
    *shared: Any,
    name: str,
    scan: bool = True,
    remat: str = "",
) -> list[jax.Array]:
    """The blocks of a level in a row; to be called inside a compact method.

    The first, which may change the width, stands alone; the others are one stack.

    Args:
      make: a module of a given name, `(h, *shared) -> h`.
      count: the number of blocks, at least one.
      h: the feature map.
      *shared: further arguments, the same for all.
      name: of the level; the modules are `{name}_first` and `{name}_rest`.
      scan: see `diffjax.nn.repeat.repeat`.
      remat: see `diffjax.nn.repeat.REMAT`.

    Returns:
      what came out of each.
    """
    h = once(make(f"{name}_first"), h, *shared, remat=remat)
    rest = make(f"{name}_rest")
    _, outputs = repeat(rest, count - 1, h, *shared, scan=scan, remat=remat, collect=True, apart=False)
    return [h] if outputs is None else [h, *outputs]


def ascend(
    make: Callable[[str], nn.Module],
    skips: Sequence[jax.Array],
    h: jax.Array,
    *shared: Any,
    name: str,
    scan: bool = True,
    remat: str = "",
) -> jax.Array:
    """A block for each skip, the last first; to be called inside a compact method.

    What enters the first and the skip of the last may have another width; the blocks between are one stack.

    Args:
      make: a module of a given name, `(h, *shared, skip) -> h`.
      skips: the feature map that entered the level on the way down, and what came out of each block there.
      h: the feature map.
      *shared: further arguments, the same for all.
      name: of the level; the modules are `{name}_first`, `{name}_rest` and `{name}_last`.
      scan: see `diffjax.nn.repeat.repeat`.
      remat: see `diffjax.nn.repeat.REMAT`.
    """
    entered, *between, last = skips
    h = once(make(f"{name}_first"), h, *shared, last, remat=remat)
    if between:
        each = jnp.stack(between[::-1])
        h, _ = repeat(
            make(f"{name}_rest"), len(between), h, *shared, each=each, scan=scan, remat=remat, apart=False
        )
    return once(make(f"{name}_last"), h, *shared, entered, remat=remat)
