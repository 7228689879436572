"""The moving average of the parameters."""

import jax
import jax.numpy as jnp


def decay_at(step: jax.Array, decay: float) -> jax.Array:
    """The average's decay at an update: `min(decay, (1 + step) / (10 + step))`.

    The warm-up lets the average forget the initial parameters; it is TensorFlow's `num_updates` rule.
    """
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update(average: jax.Array, value: jax.Array, decay: jax.Array) -> jax.Array:
    """`average + (1 - decay) (value - average)`, on trees."""
    return jax.tree.map(lambda a, v: a + (1.0 - decay) * (v - a), average, value)
