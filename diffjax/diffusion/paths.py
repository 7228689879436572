"""Conditional paths between data and any source, for flow matching.

A path is a function `(x0, x1, t, z) -> (x_t, velocity)`: data x0 at t = 0, a draw x1 of the source at t = 1
(noise, or images of another kind), and z, standard normal noise that blurs the path. A network that has
learned the velocity is sampled as one that predicts `velocity` on the schedule `linear_flow(sigma_min=0)`,
whichever path it was trained on: under that schedule an Euler step is the step of `ddim`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Network, evaluate
from diffjax.diffusion.inputs import Inputs, time_input
from diffjax.diffusion.losses import Penalty, squared
from diffjax.diffusion.schedules import linear_flow, widen

Path = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(x0, x1, t, z) -> (x_t, velocity)`; t broadcasts against the others."""

_STRAIGHT = linear_flow(sigma_min=0.0)
_TIME, _SQUARED = time_input(), squared()


def icfm(*, sigma: float = 0.0) -> Path:
    """`x_t = (1 - t) x0 + t x1 + sigma z`, with the velocity `x1 - x0` (Tong et al., 2024).

    With pairs from the coupling `exact` it is OT-CFM; with sigma = 0, rectified flow.
    """
    _require_sigma(sigma >= 0.0, sigma, "at least 0")
    return lambda x0, x1, t, z: ((1.0 - t) * x0 + t * x1 + sigma * z, x1 - x0)


def target_cfm(*, sigma: float = 1e-4) -> Path:
    """`x_t = (1 - t) x0 + (sigma + (1 - sigma) t) x1`, x1 being standard normal (Lipman et al., 2023).

    The velocity is `(1 - sigma) x1 - x0`. At t = 0 a noise of sigma is left around the data.
    """
    _require_sigma(0.0 <= sigma < 1.0, sigma, "0 <= sigma < 1")
    slope = 1.0 - sigma
    return lambda x0, x1, t, z: ((1.0 - t) * x0 + (sigma + slope * t) * x1, slope * x1 - x0)


def schrodinger_bridge(*, sigma: float = 1.0) -> Path:
    """A Brownian bridge, `x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z` (Tong et al., 2024).

    The velocity of its Gaussians, `x1 - x0 + (1 - 2 t) / (2 t (1 - t)) (x_t - (1 - t) x0 - t x1)`, has an
    infinite variance at the ends, where the blur's share is taken to be zero. With pairs from the coupling
    `sinkhorn(epsilon=2 sigma^2, relative=False)` it is SB-CFM.
    """
    _require_sigma(sigma > 0.0, sigma, "more than 0")

    def path(x0: jax.Array, x1: jax.Array, t: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        variance = t * (1.0 - t)
        blur = sigma * jnp.sqrt(variance) * z
        # The small constant, which the published code has too, only matters at the very ends.
        return (1.0 - t) * x0 + t * x1 + blur, x1 - x0 + (1.0 - 2.0 * t) / (2.0 * variance + 1e-8) * blur

    return path


def vp_cfm(*, sigma: float = 0.0) -> Path:
    """`x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1 + sigma z` (Albergo and Vanden-Eijnden, 2023).

    The velocity is `pi / 2 (cos(pi t / 2) x1 - sin(pi t / 2) x0)`.
    """
    _require_sigma(sigma >= 0.0, sigma, "at least 0")

    def path(x0: jax.Array, x1: jax.Array, t: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The cosine as the sine of the other angle: near a right angle `cos` loses its relative precision.
        sin, cos = (jnp.sin(0.5 * math.pi * angle) for angle in (t, 1.0 - t))
        return cos * x0 + sin * x1 + sigma * z, 0.5 * math.pi * (cos * x1 - sin * x0)

    return path


PATHS: dict[str, Callable[..., Path]] = {
    "icfm": icfm,
    "target_cfm": target_cfm,
    "schrodinger_bridge": schrodinger_bridge,
    "vp_cfm": vp_cfm,
}


def flow_matching_loss(
    net: Network,
    path: Path,
    *,
    x0: jax.Array,
    x1: jax.Array,
    t: jax.Array,
    keys: jax.Array,
    inputs: Inputs = _TIME,
    penalty: Penalty = _SQUARED,
) -> jax.Array:
    """The loss of each example: the mean penalty of the velocity's error.

    Args:
      net: `(x, time input) -> velocity`.
      path: the conditional path.
      x0: data, `[batch, …]`.
      x1: the source's draws of the same shape; see `diffjax.diffusion.couplings` for which goes with which.
      t: times in [0, 1], `[batch]`.
      keys: a key for each example, for the blur of the path.
      inputs: how the network is shown `x_t` and told the time; the noise level is that of the straight path.
      penalty: of an error.

    Returns:
      `[batch]`: the mean over all axes but the first.
    """
    wide = widen(t, x0)
    x, velocity = path(x0, x1, wide, noise.normal_like(keys, x0))
    error = evaluate(net, inputs, _STRAIGHT(t), x, t) - velocity
    return jnp.mean(penalty(error), axis=tuple(range(1, error.ndim)))


def _require_sigma(holds: bool, sigma: float, expected: str) -> None:
    if not holds:
        raise ValueError(f"sigma is {sigma}; expected {expected}")
