"""The probability-flow ODE with steps of adaptive size, by diffrax."""

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import combine, velocity
from diffjax.diffusion.schedules import Schedule
from diffjax.diffusion.solvers.base import evaluate

ADAPTIVE = ("dopri5", "tsit5")


def adaptive(
    denoise: Denoiser,
    schedule: Schedule,
    x: jax.Array,
    *,
    start: float = 1.0,
    end: float,
    solver: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> jax.Array:
    """Follow `dx/dt = alpha' x0 + sigma' eps` from `start` to `end`, either way (Song et al., 2021).

    From 1 towards 0 it draws samples, from data up it finds the noise that they come from. The examples of a
    batch take the same steps, whose size the one with the largest error decides.

    Args:
      denoise: the denoiser, with conditions bound.
      schedule: the noise schedule; alpha' and sigma' must be finite from `start` to `end` (that of `vp`, of
        betas and of `linear_vp` is infinite at t = 0), and so must the estimates be.
      x: x at `start`, `[batch, …]`.
      start: a time.
      end: another time. A sample that ends above 0 still has the signal scaled by alpha(end).
      solver: "dopri5" (Dormand-Prince) or "tsit5" (Tsitouras), both of order 5 with six evaluations a step.
      rtol: the relative error that one step may make, root mean square over an example.
      atol: the absolute error, added to it.
      max_steps: accepted and rejected; beyond it, an error is raised.

    Returns:
      x at `end`, as it is.
    """
    if solver not in ADAPTIVE:
        raise ValueError(f"solver is {solver!r}; expected one of {', '.join(ADAPTIVE)}")
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("`adaptive` needs diffrax: run `pip install 'diffjax[ode]'`") from error

    def field(t: jax.Array, x: jax.Array, _: None) -> jax.Array:
        return combine(velocity(schedule(t)), evaluate(denoise, x, t))

    def error_norm(scaled: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.max(jnp.mean(scaled**2, axis=tuple(range(1, scaled.ndim)))))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[solver](),
        t0=start,
        t1=end,
        dt0=None,
        y0=x,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=error_norm),
        max_steps=max_steps,
    )
    return solution.ys[0]
