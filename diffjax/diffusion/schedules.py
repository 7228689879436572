"""Noise schedules: how much signal and how much noise there is at each time.

A schedule is a function `t -> Coeffs`, with `x_t = alpha(t) x0 + sigma(t) eps`, t = 0 at the data and t = 1
at the noise. Its derivatives come with it, because the velocity of the path is a prediction like any other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Coeffs(NamedTuple):
    """Signal and noise levels at a time, and their time derivatives; each has the shape of the time."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array


Schedule = Callable[[jax.Array], Coeffs]


def cosine(*, logsnr_min: float = -15.0, logsnr_max: float = 15.0, shift: float = 1.0) -> Schedule:
    """The variance-preserving cosine schedule (Nichol and Dhariwal, 2021), cut to a finite log-SNR.

    `alpha = cos(u)`, `sigma = sin(u)`, where the angle u runs linearly from `atan(exp(-logsnr_max / 2))` to
    `atan(exp(-logsnr_min / 2))` (Kingma et al., Variational Diffusion Models). At t = 1 a little signal is
    left, so that no prediction is singular there; at -15 its amplitude is 0.00055.

    Args:
      logsnr_min: log-SNR at t = 1.
      logsnr_max: log-SNR at t = 0.
      shift: noise level relative to the plain schedule: sigma / alpha is multiplied by it. Simple diffusion
        (Hoogeboom et al., 2023) uses `resolution / 64`.
    """
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min {logsnr_min} must be below logsnr_max {logsnr_max}")
    start, end = (math.atan(math.exp(-logsnr / 2)) for logsnr in (logsnr_max, logsnr_min))
    rest = math.atan(math.exp(logsnr_min / 2))  # what is left to a right angle at t = 1

    def schedule(t: jax.Array) -> Coeffs:
        # The cosine as the sine of the other angle: near a right angle `cos` loses its relative precision.
        sin = jnp.sin(start + (end - start) * t)
        cos = jnp.sin(rest + (end - start) * (1.0 - t))
        speed = jnp.full_like(sin, end - start)
        if shift != 1.0:
            # tan(shifted) = shift tan(angle); its derivative follows from d tan = (1 + tan^2) d angle.
            norm = jnp.sqrt(cos**2 + shift**2 * sin**2)
            sin, cos, speed = shift * sin / norm, cos / norm, speed * shift / norm**2
        return Coeffs(cos, sin, -sin * speed, cos * speed)

    return schedule


def linear_flow(*, sigma_min: float = 1e-4) -> Schedule:
    """The straight path of rectified flow and conditional optimal transport, `x_t = (1 - t) x0 + t eps`.

    Both ends are pulled in by `sigma_min`, so that log-SNR stays finite and every prediction can be inverted
    (Lipman et al., 2023; Liu et al., 2023).
    """

    def schedule(t: jax.Array) -> Coeffs:
        length = 1.0 - 2.0 * sigma_min
        sigma = sigma_min + length * t
        alpha = sigma_min + length * (1.0 - t)  # not 1 - sigma, which would cancel near t = 1
        speed = jnp.full_like(sigma, length)
        return Coeffs(alpha, sigma, -speed, speed)

    return schedule


def logsnr(coeffs: Coeffs) -> jax.Array:
    """The log signal-to-noise ratio, `2 log(alpha / sigma)`."""
    return 2.0 * (jnp.log(coeffs.alpha) - jnp.log(coeffs.sigma))


def expand(coeffs: Coeffs, x: jax.Array) -> Coeffs:
    """Give coefficients of shape `[batch]` trailing axes of size one, to broadcast against `x`."""
    return Coeffs(*(c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) for c in coeffs))


def corrupt(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Draw from the forward process: `alpha(t) x0 + sigma(t) eps`, with `t` of shape `[batch]`."""
    coeffs = expand(schedule(t), x0)
    return coeffs.alpha * x0 + coeffs.sigma * eps
