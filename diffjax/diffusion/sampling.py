"""Sampling: a whole trajectory as one `lax.scan`."""

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.schedules import Schedule
from diffjax.diffusion.solvers import Solver, normal_like


def uniform_times(num_steps: int) -> jax.Array:
    """`num_steps + 1` equally spaced times from 1 to 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    return jnp.linspace(1.0, 0.0, num_steps + 1)


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    *,
    keys: jax.Array,
    shape: tuple[int, ...],
    times: jax.Array,
) -> jax.Array:
    """Draw samples, from noise at `times[0]` to data.

    The result is the denoiser's estimate of the data at the last time, at which all but nothing of the noise
    is left.

    Args:
      denoise: the denoiser, with conditions bound.
      schedule: the noise schedule.
      solver: the solver.
      keys: one PRNG key per example, `[batch]`. An example's randomness comes from its key alone.
      shape: the shape of one example.
      times: decreasing times, `[num_steps + 1]`.

    Returns:
      `[batch, *shape]`, float32.
    """
    start_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    x = normal_like(start_keys, jnp.zeros((keys.shape[0], *shape)))
    start = schedule(times[0])
    x = start.sigma * x  # the signal's mean is not known; at t = 1 its share is negligible

    def body(state, now):
        x, carry = state
        number, t, s = now
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        return solver.step(denoise, schedule, x, t, s, step_keys, carry), None

    numbers = jnp.arange(1, times.shape[0])
    (x, _), _ = jax.lax.scan(body, (x, solver.init(x)), (numbers, times[:-1], times[1:]))
    return x / schedule(times[-1]).alpha
