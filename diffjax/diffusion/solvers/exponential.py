"""One-step exponential integrators: DPM-Solver and DPM-Solver++ (Lu et al., 2022), and what is built on them.

In `y = x / alpha` and `lambda = log(alpha / sigma)` the linear part of the probability-flow ODE is solved
exactly; a step of size `h = lambda_s - lambda_t` approximates only the network's share of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.schedules import Schedule, time_at
from diffjax.diffusion.solvers.base import (
    Solver,
    evaluate,
    half_logsnr,
    no_memory,
    noise_to_signal,
    time_of,
)


def dpm_solver(*, order: int = 2) -> Solver:
    """DPM-Solver-1, 2 and 3 (Lu et al., 2022), in terms of eps: `order` evaluations a step.

    It divides by sigma(s), so its grid must not end at sigma = 0 (there it takes a step of first order).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; expected 1, 2 or 3")

    def step(denoise, schedule, x, t, s, keys, carry):
        ends_clean = schedule(s).sigma == 0.0
        x = jax.lax.cond(
            ends_clean,
            lambda: _dpm_step(1, denoise, schedule, x, t, s),
            lambda: _dpm_step(order, denoise, schedule, x, t, s),
        )
        return x, carry

    return Solver(no_memory, step, order=order)


def dpm_fast(*, remainder: int = 0) -> Solver:
    """DPM-Solver-fast (Lu et al., 2022): third-order steps, and lower ones at the end to spend what is left.

    Args:
      remainder: the number of evaluations modulo 3; with `num_steps` steps there are `3 (num_steps - 1) +
        remainder` of them.
    """
    if remainder not in (0, 1, 2):
        raise ValueError(f"remainder is {remainder}; expected 0, 1 or 2")
    ending = (2, 1) if remainder == 0 else (remainder,)

    def init(x: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = times.shape[0] - 1
        orders = (
            ([3] * count + list(ending))[-count:]
            if count <= len(ending)
            else ([3] * (count - len(ending)) + list(ending))
        )
        return jnp.asarray(orders), jnp.int32(0)

    def step(denoise, schedule, x, t, s, keys, carry):
        orders, number = carry
        branches = [lambda n=n: _dpm_step(n, denoise, schedule, x, t, s) for n in (1, 2, 3)]
        return jax.lax.switch(orders[number] - 1, branches), (orders, number + 1)

    return Solver(init, step, order=2)


def _dpm_step(order: int, denoise: Denoiser, schedule: Schedule, x, t, s) -> jax.Array:
    now, then = schedule(t), schedule(s)
    y, first = x / now.alpha, evaluate(denoise, x, t).eps
    end, h = noise_to_signal(then), half_logsnr(then) - half_logsnr(now)
    # end * expm1(h) is sigma_t - sigma_s (as sigma / alpha), also where the step ends without noise.
    linear = y - (noise_to_signal(now) - end) * first
    if order == 1:
        return then.alpha * linear

    def eps_at(share: float, y: jax.Array) -> jax.Array:
        time = time_at(schedule, 2.0 * (half_logsnr(now) + share * h))
        return evaluate(denoise, schedule(time).alpha * y, time).eps

    def to(share: float) -> jax.Array:
        """The noise level that a share of the step arrives at."""
        return noise_to_signal(now) * jnp.exp(-share * h)

    if order == 2:
        middle = eps_at(0.5, y - to(0.5) * jnp.expm1(0.5 * h) * first)
        return then.alpha * (linear - end * jnp.expm1(h) * (middle - first))
    second = eps_at(1 / 3, y - to(1 / 3) * jnp.expm1(h / 3) * first)
    bend = 2.0 * (jnp.expm1(2 / 3 * h) / (2 / 3 * h) - 1.0) * (second - first)
    third = eps_at(2 / 3, y - to(2 / 3) * (jnp.expm1(2 / 3 * h) * first + bend))
    return then.alpha * (linear - end * 1.5 * (jnp.expm1(h) / h - 1.0) * (third - first))


def dpm2() -> Solver:
    """k-diffusion's DPM2: a step in sigma by the slope at the geometric mean of both noise levels."""

    def step(denoise, schedule, x, t, s, keys, carry):
        now, then = schedule(t), schedule(s)
        y, first = x / now.alpha, evaluate(denoise, x, t).eps
        start, end = noise_to_signal(now), noise_to_signal(then)

        def with_middle() -> jax.Array:
            middle = jnp.sqrt(start * end)
            time = time_of(schedule, middle)
            return evaluate(denoise, schedule(time).alpha * (y + (middle - start) * first), time).eps

        slope = jax.lax.cond(end == 0.0, lambda: first, with_middle)
        return then.alpha * (y + (end - start) * slope), carry

    return Solver(no_memory, step, order=2)


def dpmpp_2s() -> Solver:
    """DPM-Solver++(2S) (Lu et al., 2022): the data as estimated halfway, in lambda, through the step."""

    def step(denoise, schedule, x, t, s, keys, carry):
        now, then = schedule(t), schedule(s)
        first, h = evaluate(denoise, x, t).x0, half_logsnr(then) - half_logsnr(now)

        def halfway() -> jax.Array:
            time = time_at(schedule, 2.0 * (half_logsnr(now) + 0.5 * h))
            middle = schedule(time)
            inner = middle.sigma / now.sigma * x - middle.alpha * jnp.expm1(-0.5 * h) * first
            return evaluate(denoise, inner, time).x0

        x0 = jax.lax.cond(then.sigma > 0.0, halfway, lambda: first)
        return then.sigma / now.sigma * x - then.alpha * jnp.expm1(-h) * x0, carry

    return Solver(no_memory, step, order=2)


def dpmpp_sde(*, eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """DPM-Solver++ for the SDE, single step (k-diffusion): noise also enters halfway through the step.

    Args:
      eta: how much of the ancestral noise is added.
      inflate: its standard deviation.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        now, then = schedule(t), schedule(s)
        first = evaluate(denoise, x, t).x0
        start, end = noise_to_signal(now), noise_to_signal(then)

        def go(y: jax.Array, x0: jax.Array, to: jax.Array, draw: int) -> jax.Array:
            """From the start to the noise level `to`, with ancestral noise."""
            down, up = ancestral_levels(start, to, eta)
            y = down / start * y + (1.0 - down / start) * x0
            return y + inflate * up * noise.normal_like(keys, x, draw)

        def halfway() -> jax.Array:
            middle = jnp.sqrt(start * end)
            time = time_of(schedule, middle)
            inner = go(x / now.alpha, first, middle, 0)
            return evaluate(denoise, schedule(time).alpha * inner, time).x0

        x0 = jax.lax.cond(end == 0.0, lambda: first, halfway)
        return then.alpha * go(x / now.alpha, x0, end, 1), carry

    return Solver(no_memory, step, order=None)


def ancestral_levels(start: jax.Array, end: jax.Array, eta: float) -> tuple[jax.Array, jax.Array]:
    """Noise levels sigma / alpha of an ancestral step: how far down it goes, and how much noise it then adds.

    `up = min(end, eta sqrt(end^2 (start^2 - end^2) / start^2))`, `down^2 = end^2 - up^2`.
    """
    share = end / start
    up = end * jnp.minimum(1.0, eta * jnp.sqrt(jnp.maximum(1.0 - share**2, 0.0)))
    return jnp.sqrt(jnp.maximum(end**2 - up**2, 0.0)), up


def ancestral(solver: Solver, *, eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """The ancestral version of a deterministic one-step solver: go further down, then add noise.

    Args:
      solver: the solver.
      eta: 0 is the solver itself.
      inflate: the standard deviation of the noise.
    """

    def step(denoise, schedule, x, t, s, keys, carry):
        now, then = schedule(t), schedule(s)
        down, up = ancestral_levels(noise_to_signal(now), noise_to_signal(then), eta)
        below = jnp.where(down == 0.0, jnp.where(then.sigma == 0.0, s, 0.0), time_of(schedule, down))
        x, carry = solver.step(denoise, schedule, x, t, below, keys, carry)
        x = then.alpha * (x / schedule(below).alpha + inflate * up * noise.normal_like(keys, x))
        return x, carry

    return Solver(solver.init, step, order=solver.order if eta == 0.0 else None)


def dpm2_ancestral(*, eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """k-diffusion's DPM2 with ancestral noise."""
    return ancestral(dpm2(), eta=eta, inflate=inflate)


def dpmpp_2s_ancestral(*, eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """k-diffusion's DPM-Solver++(2S) with ancestral noise."""
    return ancestral(dpmpp_2s(), eta=eta, inflate=inflate)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "dpm_solver": dpm_solver,
    "dpm_fast": dpm_fast,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
}
