"""From a network to a denoiser: `(x, t) -> Estimate`, with schedule and conditions bound."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.inputs import Inputs, logsnr_input
from diffjax.diffusion.predictions import Estimate, Prediction, solve
from diffjax.diffusion.schedules import Coeffs, Schedule, expand, widen

Network = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x, what it is told of the time [batch]) -> prediction`, with parameters and conditions bound."""

Denoiser = Callable[[jax.Array, jax.Array], Estimate]
"""`(x_t, t [batch]) -> Estimate`."""

_LOGSNR = logsnr_input()


def evaluate(net: Network, inputs: Inputs, coeffs: Coeffs, x: jax.Array, t: jax.Array) -> jax.Array:
    """The network's output at `x_t`, as float32 whatever it computes in."""
    scale, told = inputs(coeffs, t)
    return net(widen(scale, x) * x, told).astype(jnp.float32)


def make_denoiser(
    net: Network,
    schedule: Schedule,
    prediction: Prediction,
    inputs: Inputs = _LOGSNR,
    *,
    learned_variance: bool = False,
) -> Denoiser:
    """Read a network's output as estimates of the data and the noise.

    Args:
      net: the network.
      schedule: the noise schedule.
      prediction: what the output means.
      inputs: how the network is shown `x_t` and told the noise level; by default unscaled and as log-SNR, so
        that it can be used with another schedule than the one that it was trained with.
      learned_variance: whether the output has twice the channels of x (the last axis), the second half being
        the variance (see `diffjax.diffusion.learned_variance`).
    """

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        coeffs = schedule(t)
        output = evaluate(net, inputs, coeffs, x, t)
        fraction = None
        if learned_variance:
            output, spread = jnp.split(output, 2, axis=-1)
            fraction = 0.5 * (spread + 1.0)
        wide = expand(coeffs, x)
        return solve(prediction(wide), wide, x, output)._replace(fraction=fraction)

    return denoise
