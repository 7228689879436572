"""Solvers: one step from a time t to an earlier time s.

A solver is a pair of functions: `init(x) -> carry`, for what a multistep method remembers, and
`step(denoise, schedule, x, t, s, keys, carry) -> (x, carry)`, with t and s scalars.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Schedule

Step = Callable[[Denoiser, Schedule, jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Solver(NamedTuple):
    """A solver: how its memory starts, and how it steps."""

    init: Callable[[jax.Array], Any]
    step: Step


def normal_like(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise of the shape of `x`, each example from its own key (`keys`: `[batch]`).

    An example's noise does not depend on what else is in its batch.
    """
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def _evaluate(denoise: Denoiser, x: jax.Array, t: jax.Array) -> Estimate:
    return denoise(x, jnp.broadcast_to(t, x.shape[:1]))


def ddim(*, eta: float = 0.0) -> Solver:
    """DDIM (Song et al., 2021), equation 12, for any schedule.

    `x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z`, where c is `eta` times the standard deviation of the
    posterior q(x_s | x_t, x0). eta = 0 is deterministic and of first order; eta = 1 is ancestral sampling.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        estimate, now, then = _evaluate(denoise, x, t), schedule(t), schedule(s)
        if eta == 0.0:
            return then.alpha * estimate.x0 + then.sigma * estimate.eps, carry
        noise_std = eta * jnp.sqrt(_posterior_variance(now, then))
        kept = jnp.sqrt(jnp.maximum(then.sigma**2 - noise_std**2, 0.0))
        return then.alpha * estimate.x0 + kept * estimate.eps + noise_std * normal_like(keys, x), carry

    return Solver(lambda x: (), step)


def ddpm(*, variance: str = "small") -> Solver:
    """Ancestral sampling (Ho et al., 2020): a draw from q(x_s | x_t, x0) at the estimated x0.

    With `r = alpha_t / alpha_s` and `sigma_ts^2 = sigma_t^2 - r^2 sigma_s^2`, the posterior's mean is
    `(r sigma_s^2 x_t + alpha_s sigma_ts^2 x0) / sigma_t^2`.

    Args:
      variance: "small" is the posterior's own, `sigma_ts^2 sigma_s^2 / sigma_t^2`; "large" is `sigma_ts^2`
        (DDPM's beta), right for data of unit variance. The last step adds no noise under either: it
        returns the posterior's mean.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance is {variance!r}; expected 'small' or 'large'")

    def step(denoise, schedule, x, t, s, keys, carry):
        estimate, now, then = _evaluate(denoise, x, t), schedule(t), schedule(s)
        ratio = now.alpha / then.alpha
        step_variance = now.sigma**2 - ratio**2 * then.sigma**2
        mean = ratio * then.sigma**2 * x + then.alpha * step_variance * estimate.x0
        mean = mean / now.sigma**2
        noise_variance = _posterior_variance(now, then) if variance == "small" else step_variance
        noise_std = jnp.where(s > 0.0, jnp.sqrt(noise_variance), 0.0)
        return mean + noise_std * normal_like(keys, x), carry

    return Solver(lambda x: (), step)


def _posterior_variance(now, then) -> jax.Array:
    """Variance of q(x_s | x_t, x0)."""
    ratio = now.alpha / then.alpha
    step_variance = now.sigma**2 - ratio**2 * then.sigma**2
    return jnp.maximum(step_variance, 0.0) * then.sigma**2 / now.sigma**2


SOLVERS: dict[str, Callable[..., Solver]] = {"ddim": ddim, "ddpm": ddpm}
