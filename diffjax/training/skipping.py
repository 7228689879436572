"""Optimizers that leave out an update whose loss or gradient is not finite.

What decides it, `finite`, is a scalar on the device, so that nobody waits for it: all numbers of the update
are computed, and each is kept or not. Where that is done matters. Adam's direction must come from the moments
that were kept: were the whole new state computed and then chosen from, the old moments would be read after
the new ones are written, and compilers copy them first.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

Finite = jax.Array | bool


class Skipping(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes `finite`, too, and keeps its memory as it was where that is False.

    The updates that it returns there mean nothing. Without `finite` it is an optimizer like any other.
    """


def keep(finite: Finite, new: Any, old: Any) -> Any:
    """The tree `new` where `finite`, otherwise `old`."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def skipping(optimizer: optax.GradientTransformation) -> Skipping:
    """Any optimizer as one that skips; its memory may be read twice for it."""
    if isinstance(optimizer, Skipping):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def update(
        grads: Any, state: Any, params: Any = None, *, finite: Finite = True, **extra: Any
    ) -> tuple[Any, Any]:
        updates, new = inner.update(grads, state, params, **extra)
        return updates, keep(finite, new, state)

    return Skipping(inner.init, update)


def chain(*parts: optax.GradientTransformation) -> Skipping:
    """One after the other (`optax.chain`)."""
    return Skipping(*optax.chain(*(skipping(part) for part in parts)))


def scale_by_adam(*, b1: float, b2: float, eps: float = 1e-8) -> Skipping:
    """Adam's direction (Kingma and Ba, 2015), as `optax.scale_by_adam` has it and with its memory.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: is added to the root of the second.
    """

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, finite: Finite = True, **extra: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        mu = keep(finite, optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = keep(finite, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        means, squares = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda mean, square: mean / (jnp.sqrt(square) + eps), means, squares)
        return updates, optax.ScaleByAdamState(keep(finite, count, state.count), mu, nu)

    return Skipping(optax.scale_by_adam(b1, b2).init, update)
