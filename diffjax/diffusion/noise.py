"""Gaussian noise, each example's from its own key."""

import jax


def normal_like(keys: jax.Array, x: jax.Array, draw: int = 0) -> jax.Array:
    """Standard normal noise of the shape of `x`, each example from its own key (`keys`: `[batch]`).

    An example's noise does not depend on what else is in its batch.

    Args:
      keys: a key for each example.
      x: `[batch, …]`.
      draw: which of several independent draws from the same keys.
    """

    def normal(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, draw) if draw else key, x.shape[1:], x.dtype)

    return jax.vmap(normal)(keys)
