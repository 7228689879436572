"""From a network to a denoiser: `(x, t) -> Estimate`, with schedule and conditions bound."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.predictions import Estimate, Prediction, solve
from diffjax.diffusion.schedules import Schedule, expand, logsnr

Network = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x_t, log-SNR [batch]) -> prediction`, with parameters and conditions bound."""

Denoiser = Callable[[jax.Array, jax.Array], Estimate]
"""`(x_t, t [batch]) -> Estimate`."""


def make_denoiser(net: Network, schedule: Schedule, prediction: Prediction) -> Denoiser:
    """Read a network's output as estimates of the data and the noise.

    The network is told the noise level as log-SNR, not the time, so it can be used with another schedule than
    the one that it was trained with. Estimates are float32, whatever the network computes in.
    """

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        coeffs = schedule(t)
        output = net(x, logsnr(coeffs)).astype(jnp.float32)
        wide = expand(coeffs, x)
        return solve(prediction(wide), wide, x, output)

    return denoise
