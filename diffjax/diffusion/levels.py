"""The loss by noise level: one curve says more than one mean, in which few levels outweigh the others."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp


def by_level(losses: jax.Array, levels: jax.Array, edges: Sequence[float]) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of the losses in each bin of noise levels.

    Both add up over steps and hosts, and `sums / counts` is the mean where anything was counted. A level on
    an edge belongs to the bin above it; one beyond the edges, even an infinite log-SNR, to the nearest bin.

    Args:
      losses: of each example, `[batch]`.
      levels: of each example, `[batch]`: times, log-SNRs, or whatever else the edges are given in.
      edges: rising, one more than there are bins.

    Returns:
      `(sums [bins], counts [bins])`; an empty bin has two zeros.
    """
    bins = len(edges) - 1
    if bins < 1 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"edges is {tuple(edges)}; expected at least two rising numbers")
    place = jnp.searchsorted(jnp.asarray(edges[1:-1], levels.dtype), levels, side="right")
    # Segments, not a product with one-hot rows: a loss that is not finite stays in its bin.
    sums = jax.ops.segment_sum(losses, place, num_segments=bins)
    return sums, jax.ops.segment_sum(jnp.ones_like(losses), place, num_segments=bins)


def level_names(edges: Sequence[float], *, prefix: str = "loss_by_logsnr") -> tuple[str, ...]:
    """A metric's name for each bin, such as `loss_by_logsnr/-10_to_-5`."""
    return tuple(f"{prefix}/{low:g}_to_{high:g}" for low, high in pairwise(edges))


def uncertain(loss: jax.Array, log_variance: jax.Array) -> jax.Array:
    """`loss exp(-u) + u`: the loss, weighted by an uncertainty u that is learned with it.

    At its minimum over u, `u = log(loss)` and the weight is `1 / loss`: every noise level comes to contribute
    the same (Kendall et al., 2018; Karras et al., 2024: EDM2, where a small network of the noise level gives
    u).

    Args:
      loss: of each example, `[batch]`, at least 0.
      log_variance: u, `[batch]`.
    """
    return loss * jnp.exp(-log_variance) + log_variance
