"""Steps up: a grid whose times rise again, where noise is added that was removed before."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.solvers.base import Solver
from diffjax.diffusion.solvers.runge_kutta import runge_kutta


def jumping(solver: Solver) -> Solver:
    """A solver for grids that rise again: a step to a later time is a draw from the forward process.

    `x_s = r x_t + sqrt(sigma_s^2 - r^2 sigma_t^2) z` with `r = alpha_s / alpha_t`; the solver's memory starts
    anew. Restart sampling (Xu et al., 2023) and RePaint's resampling (Lugmayr et al., 2022) are such grids.
    """

    def init(x: jax.Array, times: jax.Array):
        fresh = solver.init(x, times)
        return fresh, fresh

    def step(denoise, schedule, x, t, s, keys, carry):
        fresh, inner = carry

        def up():
            now, then = schedule(t), schedule(s)
            ratio = then.alpha / now.alpha
            added = jnp.sqrt(jnp.maximum(then.sigma**2 - (ratio * now.sigma) ** 2, 0.0))
            return ratio * x + added * noise.normal_like(keys, x), fresh

        x, inner = jax.lax.cond(s > t, up, lambda: solver.step(denoise, schedule, x, t, s, keys, inner))
        return x, (fresh, inner)

    return solver._replace(init=init, step=step, order=None, rises=True)


def restart(*, method: str = "heun", variable: str = "sigma") -> Solver:
    """Restart sampling (Xu et al., 2023): Runge-Kutta steps on a grid that rises again, `grids.restart`."""
    return jumping(runge_kutta(method=method, variable=variable))


SOLVERS: dict[str, Callable[..., Solver]] = {"restart": restart}
