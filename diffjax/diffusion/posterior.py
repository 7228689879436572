"""Sampling p(x0 | y): classifier guidance, and inverse problems with the prior of a diffusion model.

`measure` is A of `y = A(x0) + noise_std n`: a function of a batch that treats each example by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.grids import check_times
from diffjax.diffusion.guidance import Scale, wide
from diffjax.diffusion.guidance_rules import moved
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Coeffs, Schedule, expand
from diffjax.diffusion.solvers.base import Solver

Measure = Callable[[jax.Array], jax.Array]

_KNOWN_DRAW = 7  # the solvers draw with smaller numbers


def add_score(estimate: Estimate, coeffs: Coeffs, gradient: jax.Array) -> Estimate:
    """Add the gradient of a log-density of `x_t`: `x0 + (sigma^2 / alpha) gradient`, `eps - sigma gradient`.

    Without signal (alpha = 0) `x_t` is eps and tells nothing of x0: the estimate stays as it is.
    """
    alpha = jnp.where(coeffs.alpha > 0.0, coeffs.alpha, jnp.inf)
    return moved(estimate, coeffs, coeffs.sigma / alpha * gradient)


def by_gradient(
    denoise: Denoiser,
    schedule: Schedule,
    log_likelihood: Callable[[jax.Array, jax.Array], jax.Array],
    guidance_scale: Scale = 1.0,
) -> Denoiser:
    """Classifier guidance (Dhariwal and Nichol, 2021): `eps - guidance_scale sigma grad log p(y | x_t)`.

    Args:
      denoise: the denoiser.
      schedule: the noise schedule.
      log_likelihood: `(x_t, t) -> [batch]`, log p(y | x_t) up to a constant.
      guidance_scale: as of `guidance.guided`; 1 samples p(x0 | y) where both models are exact.
    """

    def led(x: jax.Array, t: jax.Array) -> Estimate:
        gradient = jax.grad(lambda x: log_likelihood(x, t).sum())(x)
        return add_score(denoise(x, t), expand(schedule(t), x), wide(guidance_scale, x, t) * gradient)

    return led


def pigdm(
    denoise: Denoiser,
    schedule: Schedule,
    measure: Measure,
    y: jax.Array,
    *,
    noise_std: float = 0.0,
    data_std: float = 1.0,
    iterations: int = 50,
) -> Denoiser:
    """Pseudo-inverse guidance (Song et al., 2023) for linear measurements.

    p(x0 | x_t) is taken to be N(x0hat, r^2) with `1 / r^2 = 1 / data_std^2 + alpha^2 / sigma^2`, which makes
    `grad log p(y | x_t) = J^T A^T (r^2 A A^T + noise_std^2)^-1 (y - A x0hat)`, with `J = d x0hat / d x_t`.
    Added to the score as it is (the paper also weights it), which is exact for data N(0, data_std^2).

    Args:
      denoise: the denoiser.
      schedule: the noise schedule.
      measure: A, linear; its transpose is derived.
      y: the measurement, `[batch, …]`.
      noise_std: of the measurement.
      data_std: of the data.
      iterations: the most that the linear system gets, of conjugate gradients; with orthogonal rows of one
        norm (masks, means of patches) it takes one.
    """
    if noise_std < 0.0 or not data_std > 0.0:
        raise ValueError(f"noise_std {noise_std} must be at least 0, and data_std {data_std} above 0")

    def backward(z: jax.Array, like: jax.Array) -> jax.Array:
        return jax.linear_transpose(measure, like)(z)[0]

    def solve(residual: jax.Array, variance: jax.Array, like: jax.Array) -> jax.Array:
        """`(variance A A^T + noise_std^2)^-1 residual` of one example."""
        total = variance + noise_std**2  # divided by, lest the system be tiny near the data
        share = variance / total

        def system(z: jax.Array) -> jax.Array:
            return share * measure(backward(z[None], like))[0] + (1.0 - share) * z

        return cg(system, residual / total, tol=1e-6, maxiter=iterations)[0]

    def led(x: jax.Array, t: jax.Array) -> Estimate:
        def parts(x: jax.Array) -> tuple[jax.Array, Estimate]:
            estimate = denoise(x, t)
            return estimate.x0, estimate

        x0, pull, estimate = jax.vjp(parts, x, has_aux=True)
        coeffs = schedule(t)
        variance = (coeffs.sigma * data_std) ** 2 / (coeffs.sigma**2 + (coeffs.alpha * data_std) ** 2)
        solved = jax.vmap(lambda r, v: solve(r, v, x0[:1]))(y - measure(x0), variance)
        (gradient,) = pull(backward(solved, x0))
        return add_score(estimate, expand(coeffs, x), gradient)

    return led


def dps(solver: Solver, measure: Measure, y: jax.Array, *, zeta: float = 1.0) -> Solver:
    """Diffusion posterior sampling (Chung et al., 2023): a solver that descends towards the measurement.

    Each step is followed by `x_s - zeta grad_{x_t} |y - A(x0hat(x_t))|`. This is the paper's gradient of the
    square with a step size divided by the norm; a factor of 2 is in zeta. A need not be linear.

    Args:
      solver: the solver (the paper: ancestral sampling); x0hat is that of its first evaluation in a step.
      measure: A, differentiable.
      y: the measurement, `[batch, …]`.
      zeta: the step size; it has no scale of its own, so tune it (the paper: 0.3 to 1 for images of 256 px).
    """
    if not zeta > 0.0:
        raise ValueError(f"zeta is {zeta}; expected more than 0")

    def step(denoise, schedule, x, t, s, keys, carry):
        def distance(x: jax.Array):
            estimates: list[Estimate] = []

            def spy(x: jax.Array, t: jax.Array) -> Estimate:
                estimates.append(denoise(x, t))
                return estimates[-1]

            stepped = solver.step(spy, schedule, x, t, s, keys, carry)
            squares = (y - measure(estimates[0].x0)) ** 2
            norms = jnp.sqrt(jnp.maximum(squares.sum(axis=tuple(range(1, y.ndim))), 1e-20))
            return norms.sum(), stepped

        gradient, (there, memory) = jax.grad(distance, has_aux=True)(x)
        return there - zeta * gradient, memory

    return solver._replace(step=step, order=None)


def repaint(solver: Solver, known: jax.Array, mask: jax.Array) -> Solver:
    """Inpainting (RePaint; Lugmayr et al., 2022): after each step the known pixels are put in, noised.

    With `solvers.wrappers.jumping(repaint(...))` on `resampling_times`, the rest has time to agree with them.

    Args:
      solver: the solver.
      known: images in the range of the data, `[batch, …]`.
      mask: 1 where they are known, 0 elsewhere; broadcasts against them.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        x, carry = solver.step(denoise, schedule, x, t, s, keys, carry)
        then = schedule(s)
        noised = then.alpha * known + then.sigma * noise.normal_like(keys, x, draw=_KNOWN_DRAW)
        return jnp.where(mask > 0, noised, x), carry

    return solver._replace(step=step, order=None)


def resampling_times(times: np.ndarray, *, jump: int = 10, repeats: int = 10) -> np.ndarray:
    """RePaint's time grid: every stretch of `jump` steps, but the first ones, is run through `repeats` times.

    Args:
      times: decreasing times, `[num_steps + 1]`.
      jump: the steps of a stretch; each return is one step up over all of them.
      repeats: 1 leaves the grid as it is.
    """
    if jump < 1 or repeats < 1:
        raise ValueError(f"jump is {jump}, repeats {repeats}; expected 1 or more of both")
    last, path = len(check_times(times)) - 1, []
    for place in range(last + 1):
        path.append(place)
        left = last - place  # the paper returns from one step before the end, and each `jump` before that
        if left % jump == 1 % jump and 0 < left <= last - jump:
            path += list(range(place - jump, place + 1)) * (repeats - 1)
    return np.asarray(times)[path]
