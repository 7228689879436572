"""Ancestral sampling: draws from the reverse of the forward process (DDPM), and its family (DDIM)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Coeffs
from diffjax.diffusion.solvers.base import Solver, evaluate, no_memory


def ddim(*, eta: float = 0.0) -> Solver:
    """DDIM (Song et al., 2021), equation 12, for any schedule.

    `x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z`, where c is `eta` times the standard deviation of the
    posterior q(x_s | x_t, x0). eta = 0 is deterministic and of first order; eta = 1 is ancestral sampling.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        if eta == 0.0:
            return then.alpha * estimate.x0 + then.sigma * estimate.eps, carry
        noise_std = eta * jnp.sqrt(_posterior_variance(now, then))
        kept = jnp.sqrt(jnp.maximum(then.sigma**2 - noise_std**2, 0.0))
        return then.alpha * estimate.x0 + kept * estimate.eps + noise_std * noise.normal_like(keys, x), carry

    return Solver(no_memory, step, order=1 if eta == 0.0 else None)


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
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        ratio = now.alpha / then.alpha
        step_variance = now.sigma**2 - ratio**2 * then.sigma**2
        mean = ratio * then.sigma**2 * x + then.alpha * step_variance * estimate.x0
        mean = mean / now.sigma**2
        noise_variance = _posterior_variance(now, then) if variance == "small" else step_variance
        noise_std = jnp.where(s > 0.0, jnp.sqrt(noise_variance), 0.0)
        return mean + noise_std * noise.normal_like(keys, x), carry

    return Solver(no_memory, step, order=None)


def _posterior_variance(now: Coeffs, then: Coeffs) -> jax.Array:
    """Variance of q(x_s | x_t, x0)."""
    ratio = now.alpha / then.alpha
    step_variance = now.sigma**2 - ratio**2 * then.sigma**2
    return jnp.maximum(step_variance, 0.0) * then.sigma**2 / now.sigma**2


def euler_ancestral(*, eta: float = 1.0) -> Solver:
    """k-diffusion's Euler steps with ancestral noise: the same as DDIM with this eta, under any schedule."""
    return ddim(eta=eta)


def consistency(*, sigma_min: float = 0.0) -> Solver:
    """Multistep sampling of consistency models (Song et al., 2023, algorithm 1): estimate, then renoise.

    Args:
      sigma_min: the noise level sigma / alpha at which the data is taken to lie (0.002 in the paper): so much
        less noise is added.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        then = schedule(s)
        noise_std = jnp.sqrt(jnp.maximum(then.sigma**2 - (then.alpha * sigma_min) ** 2, 0.0))
        return then.alpha * evaluate(denoise, x, t).x0 + noise_std * noise.normal_like(keys, x), carry

    return Solver(no_memory, step, order=None)


def lcm(*, sigma_data: float = 0.5, timestep_scale: float = 10.0, train_steps: int = 1000) -> Solver:
    """Latent consistency models (Luo et al., 2023): `consistency`, whose estimate at the clean end is x.

    `x0 = c_skip x + c_out x0(x)` with `c_skip = sigma_data^2 / (u^2 + sigma_data^2)`, `c_out = u / sqrt(u^2 +
    sigma_data^2)` and u the number of the time step multiplied by `timestep_scale`.
    """
    inner = consistency()

    def step(denoise, schedule, x, t, s, keys, carry):
        u = timestep_scale * (t * train_steps - 1.0)
        size = jnp.hypot(u, sigma_data)
        c_skip, c_out = (sigma_data / size) ** 2, u / size

        def bounded(x: jax.Array, t: jax.Array) -> Estimate:
            estimate = denoise(x, t)
            return estimate._replace(x0=c_skip * x + c_out * estimate.x0)

        return inner.step(bounded, schedule, x, t, s, keys, carry)

    return Solver(no_memory, step, order=None)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler_ancestral": euler_ancestral,
    "consistency": consistency,
    "lcm": lcm,
}
