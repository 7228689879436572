"""What a solver is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Coeffs, Schedule, time_at

Step = Callable[[Denoiser, Schedule, jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""`(denoise, schedule, x, t, s, keys, carry) -> (x_s, carry)`: scalars t and s, a key for each example."""


class Solver(NamedTuple):
    """A way to go from a time t to the next time s.

    Attributes:
      init: `(x, times) -> carry`, how its memory starts, given the whole time grid.
      step: one step.
      order: of the convergence to the probability-flow ODE; None where it is stochastic.
      rises: whether it gives a meaning to a step to a later time.
      at_end: whether it evaluates the denoiser at the last time of the grid.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Step
    order: int | None
    rises: bool = False
    at_end: bool = False


def no_memory(x: jax.Array, times: jax.Array) -> tuple[()]:
    """The memory of a solver that needs none."""
    return ()


def evaluate(denoise: Denoiser, x: jax.Array, t: jax.Array) -> Estimate:
    """The estimate at a scalar time."""
    return denoise(x, jnp.broadcast_to(t, x.shape[:1]))


def half_logsnr(coeffs: Coeffs) -> jax.Array:
    """lambda = log(alpha / sigma), the variable of the exponential integrators; finite at exact ends too."""
    return jnp.log(jnp.maximum(coeffs.alpha, 1e-15)) - jnp.log(jnp.maximum(coeffs.sigma, 1e-15))


def noise_to_signal(coeffs: Coeffs) -> jax.Array:
    """sigma / alpha: the noise level where the signal is not scaled."""
    return coeffs.sigma / coeffs.alpha


def time_of(schedule: Schedule, sigma: jax.Array) -> jax.Array:
    """The time at which a schedule has the noise level sigma / alpha."""
    return time_at(schedule, -2.0 * jnp.log(sigma))
