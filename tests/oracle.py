"""Denoisers in closed form, for data whose distribution is known: what a perfect network would say."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Schedule, expand


def gaussian_denoiser(schedule: Schedule, mean: float, std: float) -> Denoiser:
    """The posterior mean of x0 and eps where every pixel is N(mean, std^2)."""

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        alpha, sigma, *_ = expand(schedule(t), x)
        centred = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Estimate(x0=mean + alpha * std**2 * centred, eps=sigma * centred)

    return denoise


def gaussian_flow(
    schedule: Schedule, mean: float, std: float, x: jax.Array, t: jax.Array, s: jax.Array
) -> jax.Array:
    """Where the probability-flow ODE of N(mean, std^2) takes `x` from time t to time s.

    The flow keeps the quantiles of each pixel, so it is affine between the two marginals.
    """
    now, then = schedule(jnp.asarray(t)), schedule(jnp.asarray(s))
    variances = [c.alpha**2 * std**2 + c.sigma**2 for c in (now, then)]
    return then.alpha * mean + jnp.sqrt(variances[1] / variances[0]) * (x - now.alpha * mean)


def mixture_denoiser(
    schedule: Schedule, weights: Sequence[float], means: Sequence[float], std: float
) -> Denoiser:
    """The posterior mean where every pixel is drawn from the mixture of N(mean_k, std^2)."""
    log_weights, centres = jnp.log(jnp.asarray(weights)), jnp.asarray(means)

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        alpha, sigma, *_ = expand(schedule(t), x)
        variance = (alpha**2 * std**2 + sigma**2)[..., None]
        distances = x[..., None] - alpha[..., None] * centres
        shares = jax.nn.softmax(log_weights - distances**2 / (2.0 * variance), axis=-1)
        of_each = centres + alpha[..., None] * std**2 * distances / variance
        x0 = (shares * of_each).sum(axis=-1)
        return Estimate(x0, (x - alpha * x0) / sigma)

    return denoise
