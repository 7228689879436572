"""Keeping estimates of the data in the range of images, [-1, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Schedule, expand

Threshold = Callable[[jax.Array], jax.Array]
"""`x0 [batch, …] -> x0` within bounds."""


def none() -> Threshold:
    """Leave the estimate as it is."""
    return lambda x0: x0


def static() -> Threshold:
    """Clip to [-1, 1]."""
    return lambda x0: jnp.clip(x0, -1.0, 1.0)


def dynamic(*, percentile: float = 0.995, max_value: float | None = None) -> Threshold:
    """Dynamic thresholding (Saharia et al., 2022): clip to [-s, s] and divide by s.

    s is the given percentile of |x0|, taken for each image by itself, and at least 1.

    Args:
      percentile: in (0, 1].
      max_value: an upper limit of s (DeepFloyd IF uses 1.5 in its first stage).
    """
    if not 0.0 < percentile <= 1.0:
        raise ValueError(f"percentile is {percentile}; expected a number in (0, 1]")
    if max_value is not None and not max_value >= 1.0:
        raise ValueError(f"max_value is {max_value}; expected at least 1, or None")

    def threshold(x0: jax.Array) -> jax.Array:
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
        s = jnp.clip(s, 1.0, max_value).reshape(-1, *[1] * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) / s

    return threshold


THRESHOLDS: dict[str, Callable[..., Threshold]] = {"none": none, "static": static, "dynamic": dynamic}


def thresholded(denoise: Denoiser, schedule: Schedule, threshold: Threshold) -> Denoiser:
    """A denoiser whose x0 is thresholded: if that moves by d, eps moves by `-(alpha / sigma) d`.

    So `alpha x0 + sigma eps` stays what it was: `x_t`, or what CFG++ made of it.
    """

    def denoise_within(x: jax.Array, t: jax.Array) -> Estimate:
        estimate, coeffs = denoise(x, t), expand(schedule(t), x)
        x0 = threshold(estimate.x0)
        # Without noise, eps cannot make up for a change of x0, and nothing depends on it.
        sigma = jnp.where(coeffs.sigma > 0.0, coeffs.sigma, jnp.inf)
        return estimate._replace(x0=x0, eps=estimate.eps - coeffs.alpha / sigma * (x0 - estimate.x0))

    return denoise_within
