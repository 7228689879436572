"""Sampling: a whole trajectory as one `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.grids import check_times
from diffjax.diffusion.schedules import Schedule
from diffjax.diffusion.solvers.base import Solver, evaluate


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    *,
    keys: jax.Array,
    shape: tuple[int, ...],
    times: np.ndarray | jax.Array,
    start: jax.Array | None = None,
    denoise_last: bool = False,
    trajectory: bool = False,
) -> jax.Array:
    """Draw samples, from noise at `times[0]` to data.

    Args:
      denoise: the denoiser, with conditions bound.
      schedule: the noise schedule.
      solver: the solver.
      keys: one PRNG key per example, `[batch]`. An example's randomness comes from its key alone.
      shape: the shape of one example.
      times: decreasing times, `[num_steps + 1]`; see `diffjax.diffusion.grids`.
      start: `x` at `times[0]`, `[batch, *shape]`; by default pure noise.
      denoise_last: whether to end with the denoiser's estimate of the data at `times[-1]`, one more
        evaluation: for schedules that leave visible noise at t = 0 (`ve`).
      trajectory: whether to return x at every time rather than the result alone.

    Returns:
      `[batch, *shape]`, float32: x at the last time, with the signal at its own scale; for a trajectory,
      `[num_steps + 1, batch, *shape]`: x at each time as it is.

    Raises:
      ValueError: the times are known and are no time grid.
    """
    times = _checked(times, rising=solver.rises)
    if start is None:
        start_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        # The signal's mean is not known; at t = 1 its share is negligible.
        start = schedule(times[0]).sigma * noise.normal_like(start_keys, jnp.zeros((keys.shape[0], *shape)))
    x, path = _run(denoise, schedule, solver, start, keys, times, trajectory)
    if trajectory:
        return jnp.concatenate([start[None], path])
    if denoise_last:
        return evaluate(denoise, x, times[-1]).x0
    return x / schedule(times[-1]).alpha


def invert(
    denoise: Denoiser, schedule: Schedule, solver: Solver, x0: jax.Array, *, times: np.ndarray | jax.Array
) -> jax.Array:
    """The noise from which a deterministic solver makes an image (DDIM inversion; Song et al., 2021).

    Args:
      denoise: the denoiser, with conditions bound.
      schedule: the noise schedule.
      solver: a deterministic solver.
      x0: images, `[batch, …]`.
      times: the times of the sampler, decreasing; they are run through backwards. The denoiser is evaluated
        at the last of them too, so it must not be the exact clean end of a schedule.

    Returns:
      x at `times[0]`, to be given to `sample` as `start`.
    """
    if solver.order is None:
        raise ValueError("a stochastic solver has no inverse; choose a deterministic one")
    rising = _checked(times, rising=False)[::-1]
    keys = jax.random.split(jax.random.key(0), x0.shape[0])  # which nobody draws from
    return _run(denoise, schedule, solver, schedule(rising[0]).alpha * x0, keys, rising, False)[0]


def _run(denoise, schedule, solver, x, keys, times, trajectory):
    def body(state, now):
        x, carry = state
        number, t, s = now
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        x, carry = solver.step(denoise, schedule, x, t, s, step_keys, carry)
        return (x, carry), x if trajectory else None

    numbers = jnp.arange(1, times.shape[0])
    (x, _), path = jax.lax.scan(body, (x, solver.init(x, times)), (numbers, times[:-1], times[1:]))
    return x, path


def _checked(times: np.ndarray | jax.Array, *, rising: bool) -> jax.Array:
    if not isinstance(times, jax.core.Tracer):
        check_times(np.asarray(times, np.float32), rising=rising)
    return jnp.asarray(times, jnp.result_type(float))
