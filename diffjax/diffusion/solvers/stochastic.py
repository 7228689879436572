"""Reverse-time SDEs and Langevin dynamics."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.schedules import Coeffs, Schedule
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.diffusion.solvers.base import Solver, evaluate

Diffusion = Callable[[jax.Array, Coeffs], jax.Array]

DIFFUSIONS: dict[str, Diffusion] = {
    "constant": lambda t, c: jnp.ones_like(t),
    # Half of g(t)^2 of the SDE whose marginals these are (score-based diffusion; Song et al., 2021).
    "sbdm": lambda t, c: c.sigma * c.d_sigma - c.sigma**2 * c.d_alpha / c.alpha,
    "sigma": lambda t, c: c.sigma,
    "linear": lambda t, c: t,
    "decreasing": lambda t, c: 0.25 * (1.0 - jnp.cos(math.pi * t)) ** 2,
    "increasing_decreasing": lambda t, c: jnp.sin(math.pi * t) ** 2,
}
"""SiT's diffusion coefficients D(t) of the reverse SDE, `dx = (velocity - D score) dt + sqrt(2 D) dW`."""


def euler_maruyama(*, diffusion: str = "sigma", scale: float = 1.0, last: str = "mean") -> Solver:
    """Euler-Maruyama steps of the reverse SDE with a diffusion coefficient of choice (Ma et al., 2024, SiT).

    Every coefficient has the same marginals: 0 is the ODE, more of it forgets more of what was wrong before.

    Args:
      diffusion: of DIFFUSIONS: "constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing".
      scale: its factor.
      last: the last step is without noise: "mean" takes the SDE's drift, "euler" the velocity, "tweedie" ends
        with the denoiser's estimate. SiT's is of size 0.04: the grid `uniform(last_step=0.04)`.
    """
    if diffusion not in DIFFUSIONS or last not in ("mean", "euler", "tweedie"):
        raise ValueError(
            f"diffusion is {diffusion!r}, last {last!r}; expected one of {', '.join(DIFFUSIONS)}, and "
            "'mean', 'euler' or 'tweedie'"
        )

    def step(denoise, schedule, x, t, s, keys, remaining):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        velocity = now.d_alpha * estimate.x0 + now.d_sigma * estimate.eps
        spread = scale * DIFFUSIONS[diffusion](t, now)
        score = -estimate.eps / now.sigma
        drift = velocity - spread * score
        ends = {"mean": x + (s - t) * drift, "euler": x + (s - t) * velocity}
        ends["tweedie"] = then.alpha * estimate.x0 + then.sigma * estimate.eps
        noisy = x + (s - t) * drift + jnp.sqrt(2.0 * spread * (t - s)) * noise.normal_like(keys, x)
        return jnp.where(remaining == 1, ends[last], noisy), remaining - 1

    return Solver(lambda x, times: jnp.int32(times.shape[0] - 1), step, order=None)


def corrected(solver: Solver, *, steps: int = 1, snr: float = 0.16) -> Solver:
    """Predictor-corrector sampling (Song et al., 2021): Langevin steps where a solver arrives.

    A step is of size `2 (snr |z| / |score|)^2`, for each example by itself. None is taken where sigma is 0.

    Args:
      solver: the predictor.
      steps: the number of Langevin steps.
      snr: the ratio that sets their size.
    """

    def correct(number: int, x, denoise: Denoiser, schedule: Schedule, s, keys):
        score = -evaluate(denoise, x, s).eps / schedule(s).sigma
        z = noise.normal_like(keys, x, draw=number + 100)  # the predictor may have drawn before
        size = 2.0 * (snr * _norm(z) / _norm(score)) ** 2
        return x + size * score + jnp.sqrt(2.0 * size) * z

    def step(denoise, schedule, x, t, s, keys, carry):
        x, carry = solver.step(denoise, schedule, x, t, s, keys, carry)

        def all_of_them(x: jax.Array) -> jax.Array:
            for number in range(steps):
                x = correct(number, x, denoise, schedule, s, keys)
            return x

        return jax.lax.cond(schedule(s).sigma > 0.0, all_of_them, lambda x: x, x), carry

    return Solver(solver.init, step, order=None, at_end=True)


def _norm(x: jax.Array) -> jax.Array:
    """The norm of each example, to broadcast against x."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))


def predictor_corrector(*, predictor: str = "ddpm", steps: int = 1, snr: float = 0.16) -> Solver:
    """`corrected` ancestral ("ddpm") or deterministic ("ddim") sampling."""
    predictors: dict[str, Callable[..., Solver]] = {"ddpm": ddpm, "ddim": ddim}
    if predictor not in predictors:
        raise ValueError(f"predictor is {predictor!r}; expected 'ddpm' or 'ddim'")
    return corrected(predictors[predictor](), steps=steps, snr=snr)


def annealed_langevin(*, steps: int = 10, step_size: float = 0.2) -> Solver:
    """Annealed Langevin dynamics (Song and Ermon, 2019): Langevin steps at each noise level, then the next.

    A step is of size `step_size sigma^2` where the signal is not scaled. From the last level but one of the
    grid it goes to the last by the estimate (Jolicoeur-Martineau et al., 2021), without noise.

    Args:
      steps: Langevin steps at each level; NCSN takes 100 at ten levels.
      step_size: of a step relative to sigma^2; NCSN: 2e-5 / 0.01^2.
    """

    def step(denoise, schedule, x, t, s, keys, remaining):
        now, then = schedule(t), schedule(s)
        sigma = now.sigma / now.alpha

        def move(number: jax.Array, y: jax.Array) -> jax.Array:
            eps = evaluate(denoise, now.alpha * y, t).eps
            z = noise.normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, number), y)
            return y - 0.5 * step_size * sigma * eps + math.sqrt(step_size) * sigma * z

        y = jax.lax.fori_loop(0, steps, move, x / now.alpha)

        def finish() -> jax.Array:
            estimate = evaluate(denoise, now.alpha * y, t)
            return then.alpha * estimate.x0 + then.sigma * estimate.eps

        return jax.lax.cond(remaining == 1, finish, lambda: then.alpha * y), remaining - 1

    return Solver(lambda x, times: jnp.int32(times.shape[0] - 1), step, order=None)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
}
