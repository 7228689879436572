"""What a noise schedule is, and what can be done with any of them.

A schedule is a function `t -> Coeffs`, with `x_t = alpha(t) x0 + sigma(t) eps`, t = 0 at the data and t = 1
at the noise. Its derivatives come with it, because the velocity of the path is a prediction like any other.
"""

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


def from_logsnr(log_snr: Callable[[jax.Array], jax.Array]) -> Schedule:
    """The variance-preserving schedule of a log-SNR that falls with t.

    Args:
      log_snr: an elementwise, differentiable function of time.
    """

    def schedule(t: jax.Array) -> Coeffs:
        level, speed = jax.jvp(log_snr, (t,), (jnp.ones_like(t),))
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(level)), jnp.sqrt(jax.nn.sigmoid(-level))
        return Coeffs(alpha, sigma, 0.5 * alpha * sigma**2 * speed, -0.5 * sigma * alpha**2 * speed)

    return schedule


def shifted(schedule: Schedule, shift: float, *, norm: int = 2) -> Schedule:
    """Multiply sigma / alpha by `shift`, which adds `-2 log(shift)` to log-SNR.

    Larger images hide less under the same noise (Hoogeboom et al., 2023; Esser et al., 2024).

    Args:
      schedule: the schedule.
      shift: above 1 for more noise.
      norm: what stays as it was: 2 for `alpha^2 + sigma^2`, 1 for `alpha + sigma`, 0 for alpha.
    """
    if not shift > 0.0:
        raise ValueError(f"shift is {shift}; expected more than 0")
    if shift == 1.0:
        return schedule

    def move(alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        noisier = shift * sigma
        if norm == 0:
            return alpha, noisier
        size = jnp.add if norm == 1 else jnp.hypot
        kept = size(alpha, sigma) / size(alpha, noisier)
        return alpha * kept, noisier * kept

    def moved(t: jax.Array) -> Coeffs:
        alpha, sigma, d_alpha, d_sigma = schedule(t)
        levels, speeds = jax.jvp(move, (alpha, sigma), (d_alpha, d_sigma))
        return Coeffs(*levels, *speeds)

    return moved


def logsnr(coeffs: Coeffs) -> jax.Array:
    """The log signal-to-noise ratio, `2 log(alpha / sigma)`; infinite at an end that is exact."""
    return 2.0 * (jnp.log(coeffs.alpha) - jnp.log(coeffs.sigma))


def time_at(schedule: Schedule, level: jax.Array) -> jax.Array:
    """The inverse of log-SNR: the time in [0, 1] at which `logsnr(schedule(t)) = level`, for any schedule.

    By bisection, down to neighbouring floating-point numbers. What lies beyond the schedule's range is
    answered with the nearest end.
    """
    level = jnp.asarray(level, jnp.result_type(float))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        clearer = logsnr(schedule(middle)) > level  # so the time sought is later
        return jnp.where(clearer, middle, low), jnp.where(clearer, high, middle)

    low, high = jax.lax.fori_loop(0, 64, halve, (jnp.zeros_like(level), jnp.ones_like(level)))
    # Where the range ends, so does the search.
    first, last = logsnr(schedule(jnp.zeros_like(level))), logsnr(schedule(jnp.ones_like(level)))
    return jnp.where(level >= first, 0.0, jnp.where(level <= last, 1.0, 0.5 * (low + high)))


def expand(coeffs: Coeffs, x: jax.Array) -> Coeffs:
    """Give coefficients of shape `[batch]` trailing axes of size one, to broadcast against `x`."""
    return Coeffs(*(widen(c, x) for c in coeffs))


def widen(values: jax.Array, x: jax.Array) -> jax.Array:
    """Give values of shape `[batch]` trailing axes of size one, to broadcast against `x`."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def corrupt(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Draw from the forward process: `alpha(t) x0 + sigma(t) eps`, with `t` of shape `[batch]`."""
    coeffs = expand(schedule(t), x0)
    return coeffs.alpha * x0 + coeffs.sigma * eps
