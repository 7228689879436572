"""Importance sampling of times by their loss (Nichol and Dhariwal, 2021).

Noise levels whose loss is large and varies much are drawn more often, and weigh less in return: the expected
loss stays what it is under uniform times, its variance falls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.timesteps import inside


class LossHistory(NamedTuple):
    """The latest losses of each bin of times; bin k holds the times in `(k / bins, (k + 1) / bins]`.

    Attributes:
      losses: `[bins, length]`, in rotation.
      counts: `[bins]`, how many losses each bin has seen.
    """

    losses: jax.Array
    counts: jax.Array


def init(*, bins: int = 100, length: int = 10) -> LossHistory:
    """A history in which nothing was seen yet."""
    if bins < 1 or length < 1:
        raise ValueError(f"bins is {bins} and length is {length}; expected at least 1")
    return LossHistory(jnp.zeros((bins, length)), jnp.zeros(bins, jnp.int32))


def probabilities(history: LossHistory, *, uniform: float = 1e-3) -> jax.Array:
    """The probability of each bin, `[bins]`: `(1 - uniform) sqrt(E[L^2]) / sum + uniform / bins`.

    Every bin is as likely as the others until each has a full history.

    Args:
      history: the losses seen.
      uniform: the share that is drawn uniformly, so that no bin is forgotten; it bounds the weights.
    """
    bins, length = history.losses.shape
    size = jnp.sqrt(jnp.mean(history.losses**2, axis=1)) + 1e-20  # not 0 / 0 where nothing is left to learn
    adapted = (1.0 - uniform) * size / jnp.sum(size) + uniform / bins
    return jnp.where(jnp.all(history.counts >= length), adapted, 1.0 / bins)


def draw(
    history: LossHistory, key: jax.Array, batch: int, *, uniform: float = 1e-3
) -> tuple[jax.Array, jax.Array]:
    """Draw times.

    Returns:
      `(t [batch], weight [batch])`: the mean of `weight * loss(t)` has the expectation that the mean loss
      has under uniform times.
    """
    p = probabilities(history, uniform=uniform)
    which, where = jax.random.split(key)
    k = jax.random.choice(which, p.size, (batch,), p=p)
    t = (k + 1.0 - jax.random.uniform(where, (batch,))) / p.size
    return inside(t), 1.0 / (p.size * p[k])


def update(history: LossHistory, t: jax.Array, losses: jax.Array) -> LossHistory:
    """Add the losses at times `t`, both `[batch]`, before they are multiplied by the weights of `draw`.

    Losses that are not finite are left out; one of them would spoil every later draw.
    """
    bins, length = history.losses.shape
    # The tolerance keeps a point of a discrete grid in its own bin, however it was rounded.
    k = jnp.clip(jnp.ceil(t * bins - 1e-3).astype(jnp.int32) - 1, 0, bins - 1)
    valid = jnp.isfinite(losses)
    seen = jnp.cumsum(jax.nn.one_hot(k, bins, dtype=jnp.int32) * valid[:, None], axis=0)  # [batch, bins]
    place, total = jnp.take_along_axis(seen, k[:, None], axis=1)[:, 0], seen[-1]
    # Where a batch has more for a bin than it can keep, only the last are written: no slot is written twice.
    kept = valid & (place > total[k] - length)
    slot = jnp.where(kept, (history.counts[k] + place - 1) % length, length)
    return LossHistory(history.losses.at[k, slot].set(losses, mode="drop"), history.counts + total)
