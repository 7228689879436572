"""Ancestral sampling: draws from the reverse of the forward process (DDPM), and its family (DDIM)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.learned_variance import log_variance, posterior
from diffjax.diffusion.predictions import Estimate
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
        _, variance = posterior(now, then, x, estimate.x0)
        noise_std = eta * jnp.sqrt(variance)
        kept = jnp.sqrt(jnp.maximum(then.sigma**2 - noise_std**2, 0.0))
        return then.alpha * estimate.x0 + kept * estimate.eps + noise_std * noise.normal_like(keys, x), carry

    return Solver(no_memory, step, order=1 if eta == 0.0 else None)


def ddpm(*, variance: str = "small") -> Solver:
    """Ancestral sampling (Ho et al., 2020): a draw from q(x_s | x_t, x0) at the estimated x0.

    Args:
      variance: "small" is the posterior's own; "large" is `sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2`
        (DDPM's beta), right for data of unit variance; "learned" lies in between, where the network says
        (Nichol and Dhariwal, 2021). The last step adds no noise: it returns the posterior's mean.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance is {variance!r}; expected 'small', 'large' or 'learned'")

    def step(denoise, schedule, x, t, s, keys, carry):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        mean, small = posterior(now, then, x, estimate.x0)
        if variance == "small":
            noise_std = jnp.sqrt(small)
        else:
            if variance == "learned" and estimate.fraction is None:
                raise ValueError("the network learns no variance; choose ddpm's variance 'small' or 'large'")
            fraction = jnp.ones(1) if variance == "large" else estimate.fraction
            noise_std = jnp.exp(0.5 * log_variance(schedule, t, s, fraction))
        return mean + jnp.where(s > 0.0, noise_std, 0.0) * noise.normal_like(keys, x), carry

    return Solver(no_memory, step, order=None)


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
