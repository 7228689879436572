"""Schedules in continuous time.

Each is written so that neither end loses precision: what is small is never a difference of what is large.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules.base import Coeffs, Schedule, from_logsnr, shifted


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
        speed = end - start
        return Coeffs(cos, sin, -sin * speed, cos * speed)

    return shifted(schedule, shift)


def trigonometric(*, shift: float = 1.0) -> Schedule:
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)` (Albergo and Vanden-Eijnden, 2023; SiT's GVP).

    It reaches both ends exactly: sigma(0) = 0 and alpha(1) = 0.
    """
    return cosine(logsnr_min=-math.inf, logsnr_max=math.inf, shift=shift)


def linear_flow(*, sigma_min: float = 1e-4, shift: float = 1.0) -> Schedule:
    """The straight path of rectified flow and conditional optimal transport, `x_t = (1 - t) x0 + t eps`.

    Both ends are pulled in by `sigma_min`, so that log-SNR stays finite and every prediction can be inverted
    (Lipman et al., 2023; Liu et al., 2023). With `sigma_min = 0` the ends are exact.

    Args:
      sigma_min: the noise at t = 0, and the signal at t = 1.
      shift: sigma / alpha is multiplied by it; Stable Diffusion 3 samples at 1024 px with 3.
    """

    def schedule(t: jax.Array) -> Coeffs:
        length = 1.0 - 2.0 * sigma_min
        sigma = sigma_min + length * t
        alpha = sigma_min + length * (1.0 - t)  # not 1 - sigma, which would cancel near t = 1
        speed = jnp.full_like(sigma, length)
        return Coeffs(alpha, sigma, -speed, speed)

    return shifted(schedule, shift, norm=1)


def polynomial(*, power: float = 2.0) -> Schedule:
    """`alpha = (1 - t)^power`, `sigma = 1 - alpha`: the straight path, at another speed (Lipman et al., 2024)

    For power 1 this is `linear_flow` with exact ends.
    """

    def schedule(t: jax.Array) -> Coeffs:
        alpha, slope = (1.0 - t) ** power, power * (1.0 - t) ** (power - 1.0)
        return Coeffs(alpha, -jnp.expm1(power * jnp.log1p(-t)), -slope, slope)

    return schedule


def linear_vp(*, shift: float = 1.0) -> Schedule:
    """`alpha = 1 - t`, `sigma = sqrt(1 - alpha^2)` (Lipman et al., 2024)."""

    def schedule(t: jax.Array) -> Coeffs:
        alpha, sigma = 1.0 - t, jnp.sqrt(t * (2.0 - t))
        return Coeffs(alpha, sigma, -jnp.ones_like(t), alpha / sigma)

    return shifted(schedule, shift)


def vp(
    *, beta_min: float = 0.1, beta_max: float = 20.0, start: float = 0.0, scaled: bool = False
) -> Schedule:
    """The variance-preserving SDE (Song et al., 2021): DDPM's betas in continuous time.

    `alpha = exp(-B / 2)`, `sigma^2 = 1 - exp(-B)`, with B the integral of beta from 0 to t. beta rises
    linearly, or as the square of a linear function. DDPM's 1e-4 … 0.02 over 1000 steps are the defaults;
    Stable Diffusion's are (0.85, 12, scaled); the linear schedule of Imagen and VDM, `logsnr =
    -log(expm1(1e-4 + 10 t^2))`, is (0, 20, start=1e-4).

    Args:
      beta_min: beta at t = 0.
      beta_max: beta at t = 1.
      start: B at t = 0.
      scaled: whether the square root of beta is linear, rather than beta.
    """
    if not 0.0 <= beta_min < beta_max:
        raise ValueError(f"beta_min {beta_min} must be at least 0 and below beta_max {beta_max}")
    low, rise = (beta_min, beta_max - beta_min)
    if scaled:
        low, rise = math.sqrt(beta_min), math.sqrt(beta_max) - math.sqrt(beta_min)

    def schedule(t: jax.Array) -> Coeffs:
        now = low + rise * t
        beta = now**2 if scaled else now
        mean = low**2 + low * rise * t + rise**2 * t**2 / 3.0 if scaled else low + 0.5 * rise * t
        return _vp_coeffs(start + mean * t, beta)

    return schedule


def sub_vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The sub-VP SDE (Song et al., 2021): alpha as `vp`, `sigma = 1 - alpha^2`."""
    inner = vp(beta_min=beta_min, beta_max=beta_max)

    def schedule(t: jax.Array) -> Coeffs:
        alpha, sigma, d_alpha, _ = inner(t)
        return Coeffs(alpha, sigma**2, d_alpha, -2.0 * alpha * d_alpha)

    return schedule


def ve(*, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """The variance-exploding SDE (Song et al., 2021): `alpha = 1`, sigma geometric in t."""
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min {sigma_min} must be above 0 and below sigma_max {sigma_max}")
    rate = math.log(sigma_max / sigma_min)

    def schedule(t: jax.Array) -> Coeffs:
        sigma = sigma_min * jnp.exp(rate * t)
        return Coeffs(jnp.ones_like(t), sigma, jnp.zeros_like(t), rate * sigma)

    return schedule


def edm(*, sigma_max: float = 80.0) -> Schedule:
    """`alpha = 1`, `sigma = sigma_max t`: EDM's process (Karras et al., 2022), whose time is sigma itself.

    Which sigmas are visited is the time grid's concern (`karras`), which are trained the time sampler's
    (`log_normal_sigma`). A float's precision is relative, so t resolves 0.002 of 80 as well as 80.
    """
    if not sigma_max > 0.0:
        raise ValueError(f"sigma_max is {sigma_max}; expected more than 0")

    def schedule(t: jax.Array) -> Coeffs:
        ones = jnp.ones_like(t)
        return Coeffs(ones, sigma_max * t, 0.0 * ones, sigma_max * ones)

    return schedule


def sigmoid(*, start: float = -3.0, end: float = 3.0, temperature: float = 1.0) -> Schedule:
    """The sigmoid schedule (Jabri et al., 2023; Chen, 2023), variance preserving.

    `alpha^2 = (f(1) - f(t)) / (f(1) - f(0))` with `f(t) = sigmoid((start + (end - start) t) / temperature)`.
    """
    if not start < end or not temperature > 0.0:
        raise ValueError(f"start {start} must be below end {end}, and the temperature {temperature} above 0")

    def rise(low: jax.Array, high: jax.Array) -> jax.Array:
        """sigmoid(high) - sigmoid(low), without cancellation."""
        return jnp.sinh((high - low) / 2.0) / (2.0 * jnp.cosh(high / 2.0) * jnp.cosh(low / 2.0))

    def schedule(t: jax.Array) -> Coeffs:
        first, last, width = start / temperature, end / temperature, (end - start) / temperature
        # Distances from either end, so that both differences are exact where they are small.
        left = jnp.sinh(width * t / 2.0) / (2.0 * jnp.cosh(first / 2.0))
        right = jnp.sinh(width * (1.0 - t) / 2.0) / (2.0 * jnp.cosh(last / 2.0))
        u = first + width * t
        middle, whole = jnp.cosh(u / 2.0), rise(jnp.asarray(first, u.dtype), jnp.asarray(last, u.dtype))
        alpha, sigma = jnp.sqrt(right / middle / whole), jnp.sqrt(left / middle / whole)
        speed = width / (4.0 * middle**2 * whole)  # of sigma^2
        return Coeffs(alpha, sigma, -speed / (2.0 * alpha), speed / (2.0 * sigma))

    return schedule


def laplace(*, mean: float = 0.0, scale: float = 0.5, limit: float = 20.0) -> Schedule:
    """Log-SNR distributed as Laplace(mean, scale) when t is uniform (Hang et al., 2024), variance preserving.

    `logsnr = mean + scale log(2 t')^-1` in the first half and its mirror image in the second.

    Args:
      mean: the log-SNR that is visited most.
      scale: the distribution's width.
      limit: the tails are cut at |logsnr - mean| = limit.
    """
    least = math.exp(-limit / scale) / 2.0

    def log_snr(t: jax.Array) -> jax.Array:
        early, late = jnp.maximum(t, least), jnp.maximum(1.0 - t, least)
        return mean + scale * jnp.where(t < 0.5, -jnp.log(2.0 * early), jnp.log(2.0 * late))

    return from_logsnr(log_snr)


def _vp_coeffs(integral: jax.Array, beta: jax.Array) -> Coeffs:
    """Variance-preserving coefficients from the integral of beta up to a time, and beta at that time."""
    alpha, sigma = jnp.exp(-0.5 * integral), jnp.sqrt(-jnp.expm1(-integral))
    return Coeffs(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "trigonometric": trigonometric,
    "linear_flow": linear_flow,
    "polynomial": polynomial,
    "linear_vp": linear_vp,
    "vp": vp,
    "sub_vp": sub_vp,
    "ve": ve,
    "edm": edm,
    "sigmoid": sigmoid,
    "laplace": laplace,
}
