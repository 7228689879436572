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
    now, then = schedule(jnp.asarray(t, x.dtype)), schedule(jnp.asarray(s, x.dtype))
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


def mixture_flow(
    schedule: Schedule,
    weights: Sequence[float],
    means: Sequence[float],
    std: float,
    x: jax.Array,
    t: jax.Array,
    s: jax.Array,
) -> jax.Array:
    """Where the probability-flow ODE of the mixture takes `x` from time t to time s.

    The flow of each pixel is monotone and maps one marginal to the other, so it keeps the quantiles.
    Bisection finds the place at s where the distribution function is that of x at t.
    """

    def distribution(x: jax.Array, time: jax.Array) -> jax.Array:
        coeffs = schedule(jnp.asarray(time, x.dtype))
        deviation = jnp.sqrt(coeffs.alpha**2 * std**2 + coeffs.sigma**2)
        centred = (x[..., None] - coeffs.alpha * jnp.asarray(means)) / deviation
        return (jnp.asarray(weights) * jax.scipy.stats.norm.cdf(centred)).sum(axis=-1)

    share = distribution(x, t)
    low, high = jnp.full_like(x, -100.0), jnp.full_like(x, 100.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = distribution(middle, s) < share
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    return 0.5 * (low + high)


def correlated_denoiser(schedule: Schedule, covariance: jax.Array) -> Denoiser:
    """The posterior mean where the last axis of x0 is N(0, covariance)."""
    variances, directions = jnp.linalg.eigh(jnp.asarray(covariance))

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        alpha, sigma, *_ = expand(schedule(t), x)
        centred = x @ directions / (alpha**2 * variances + sigma**2)
        return Estimate((alpha * variances * centred) @ directions.T, (sigma * centred) @ directions.T)

    return denoise
