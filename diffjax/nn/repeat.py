"""Blocks in a row: their parameters stacked, their loop rolled or unrolled, their activations kept or not."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.xla_metadata import set_xla_metadata

from diffjax.nn.kernels import target_platform

REMAT = {
    "": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What of a block is stored for the backward pass: all; its input alone; that and its matrix products."""


def once(block: nn.Module, *args: Any, remat: str = "") -> Any:
    """`block(*args)`, of which `remat` says what is stored; to be called inside a compact method."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; expected one of {', '.join(map(repr, REMAT))}")
    if not remat:
        return block(*args)
    return nn.remat(lambda block, *args: block(*args), policy=REMAT[remat])(block, *args)


def repeat(
    block: nn.Module,
    length: int,
    carry: Any,
    *shared: Any,
    each: Any = None,
    scan: bool = True,
    remat: str = "",
    collect: bool = False,
    apart: bool = True,
) -> tuple[Any, Any]:
    """Apply `length` copies of `block`, one after the other; to be called inside a compact method.

    The parameters of all copies are stacked, with a first axis named `layers`, whether the loop is rolled or
    not: the same checkpoint serves both.

    Args:
      block: the module, `(carry, *shared) -> carry`, or `(carry, *shared, each) -> carry` given `each`.
      length: the number of copies; 0 gives `carry` back.
      carry: what passes through them; of the same shapes and dtypes before and after.
      *shared: further arguments, the same for all.
      each: arguments of each, a tree of arrays with a first axis of `length`.
      scan: one loop, compiled once, rather than `length` copies of the program.
      remat: see `REMAT`.
      collect: whether what comes out of each is wanted.
      apart: whether, where they are not one loop and run on CPUs, XLA is kept from merging them with their
        neighbours: it would add up a residual stream anew, from the first block on, wherever that is read.
        Not for blocks of convolutions, whose gradients are slow anywhere but in the main program.

    Returns:
      what comes out of the last, and what came out of each, stacked along a first axis, or None.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; expected one of {', '.join(map(repr, REMAT))}")
    if not length:
        return carry, None

    def body(block: Any, carry: Any, each: Any, *shared: Any) -> tuple[Any, Any]:
        carry = block(carry, *shared) if each is None else block(carry, *shared, each)
        return carry, (carry if collect else None)

    if remat:
        body = nn.remat(body, policy=REMAT[remat], prevent_cse=not scan)
    # Flax would draw other initial values in a function that is called.
    if apart and not scan and not block.is_initializing() and target_platform() == "cpu":
        body = _called(body)
    run = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast if each is None else 0, *(nn.broadcast for _ in shared)),
        length=length,
        # With more than there are JAX makes no loop at all. One of a single turn would stay for a while, and
        # XLA computes some convolutions in loops slowly on CPUs.
        unroll=1 if scan and length > 1 else length + 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return run(block, carry, each, *shared)


def _called(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, which the compiled program calls."""
    call = nn.jit(body)

    def run(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return run
