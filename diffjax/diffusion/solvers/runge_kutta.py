"""Runge-Kutta methods for the probability-flow ODE, in the time of the schedule or in the noise level."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.schedules import Schedule
from diffjax.diffusion.solvers.base import Solver, evaluate, no_memory, noise_to_signal, time_of


class Tableau(NamedTuple):
    """A Butcher tableau: where each stage is, what it is made of, how the stages are weighed."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int


TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2),
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4
    ),
    "rk4_38": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (0.125, 0.375, 0.375, 0.125),
        4,
    ),
}


def runge_kutta(*, method: str, variable: str = "time", last: str = "euler") -> Solver:
    """An explicit Runge-Kutta method.

    In "time" it integrates `dx/dt = alpha' x0 + sigma' eps`, as flow matching does; in "sigma"
    `d(x / alpha) / d(sigma / alpha) = eps`, as EDM, k-diffusion and diffusers do. Under the `edm` schedule
    the two are the same; where alpha(1) = 0 only the first is defined.

    Args:
      method: of TABLEAUS: "euler", "heun", "midpoint", "heun3", "rk4", or "rk4_38", the 3/8 rule that
        torchdiffeq calls rk4.
      variable: "time" or "sigma".
      last: a step to sigma = 0 is by "euler", because a network knows nothing of noise that is not there
        (EDM, JiT); or the "same" as others, for velocities that are defined at t = 0.
    """
    if method not in TABLEAUS or variable not in ("time", "sigma") or last not in ("euler", "same"):
        raise ValueError(
            f"method is {method!r}, variable {variable!r}, last {last!r}; expected a method of "
            f"{', '.join(TABLEAUS)}, 'time' or 'sigma', and 'euler' or 'same'"
        )
    tableau = TABLEAUS[method]
    advance = _in_time if variable == "time" else _in_sigma
    looks_ahead = 1.0 in tableau.nodes

    def step(denoise, schedule, x, t, s, keys, carry):
        if not looks_ahead or last == "same":
            return advance(tableau, denoise, schedule, x, t, s), carry
        ends_clean = schedule(s).sigma == 0.0
        x = jax.lax.cond(
            ends_clean,
            lambda: advance(TABLEAUS["euler"], denoise, schedule, x, t, s),
            lambda: advance(tableau, denoise, schedule, x, t, s),
        )
        return x, carry

    return Solver(no_memory, step, order=tableau.order, at_end=looks_ahead and last == "same")


def _integrate(
    tableau: Tableau,
    slope: Callable[[jax.Array, jax.Array], jax.Array],
    y: jax.Array,
    u: jax.Array,
    h: jax.Array,
) -> jax.Array:
    """One step of `dy/du = slope(y, u)` from u to u + h."""
    slopes: list[jax.Array] = []
    for node, row in zip(tableau.nodes, tableau.stages, strict=True):
        inner = sum((a * k for a, k in zip(row, slopes, strict=True) if a), jnp.zeros_like(y))
        slopes.append(slope(y + h * inner, u + node * h))
    return y + h * sum((b * k for b, k in zip(tableau.weights, slopes, strict=True) if b), jnp.zeros_like(y))


def _in_time(tableau: Tableau, denoise: Denoiser, schedule: Schedule, x, t, s) -> jax.Array:
    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        estimate, now = evaluate(denoise, x, t), schedule(t)
        return now.d_alpha * estimate.x0 + now.d_sigma * estimate.eps

    return _integrate(tableau, velocity, x, t, s - t)


def _in_sigma(tableau: Tableau, denoise: Denoiser, schedule: Schedule, x, t, s) -> jax.Array:
    now, then = schedule(t), schedule(s)
    start, end = noise_to_signal(now), noise_to_signal(then)

    def eps(y: jax.Array, sigma: jax.Array) -> jax.Array:
        # At the ends the time is known; in between it is where the schedule has this noise.
        time = jnp.where(sigma == start, t, jnp.where(sigma == end, s, time_of(schedule, sigma)))
        return evaluate(denoise, schedule(time).alpha * y, time).eps

    return then.alpha * _integrate(tableau, eps, x / now.alpha, start, end - start)


def churned(
    solver: Solver,
    *,
    churn: float,
    sigma_min: float = 0.0,
    sigma_max: float = float("inf"),
    inflate: float = 1.0,
) -> Solver:
    """EDM's stochastic sampling (Karras et al., 2022, algorithm 2): noise is added before each step.

    sigma / alpha rises by the factor `1 + min(churn / num_steps, sqrt(2) - 1)`, but not beyond the schedule's
    own range: where sampling starts at its end, give the schedule a larger sigma_max.

    Args:
      solver: a deterministic one-step solver.
      churn: S_churn; 0 adds nothing.
      sigma_min: S_tmin, below which no noise is added.
      sigma_max: S_tmax, above which none is.
      inflate: S_noise, the standard deviation of the new noise.
    """

    def init(x: jax.Array, times: jax.Array):
        return solver.init(x, times), jnp.float32(min(churn / (times.shape[0] - 1), 2.0**0.5 - 1.0))

    def step(denoise, schedule, x, t, s, keys, carry):
        inner, most = carry
        now = schedule(t)
        sigma = noise_to_signal(now)
        rise = jnp.where((sigma >= sigma_min) & (sigma <= sigma_max), most, 0.0)
        raised = jnp.where(rise > 0.0, time_of(schedule, sigma * (1.0 + rise)), t)
        then = schedule(raised)
        # Exactly 0 where nothing is added; a difference of squares, fused into one operation, is not.
        higher = noise_to_signal(then)
        added = jnp.sqrt(jnp.maximum((higher - sigma) * (higher + sigma), 0.0))
        x = then.alpha * (x / now.alpha + inflate * added * noise.normal_like(keys, x))
        x, inner = solver.step(denoise, schedule, x, raised, s, keys, inner)
        return x, (inner, most)

    return Solver(init, step, order=solver.order if churn == 0.0 else None)


def edm(
    *,
    churn: float = 40.0,
    sigma_min: float = 0.05,
    sigma_max: float = 50.0,
    inflate: float = 1.003,
    method: str = "heun",
) -> Solver:
    """EDM's stochastic sampler: `churned` Heun steps in sigma. The defaults are its ImageNet-64 ones."""
    inner = runge_kutta(method=method, variable="sigma")
    return churned(inner, churn=churn, sigma_min=sigma_min, sigma_max=sigma_max, inflate=inflate)


def _entry(method: str) -> Callable[..., Solver]:
    def solver(*, variable: str = "time", last: str = "euler") -> Solver:
        return runge_kutta(method=method, variable=variable, last=last)

    return solver


SOLVERS: dict[str, Callable[..., Solver]] = {name: _entry(name) for name in TABLEAUS} | {"edm": edm}
