"""Adams-Bashforth methods for eps: DEIS, linear multistep (LMS), and PNDM."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules import Coeffs
from diffjax.diffusion.solvers.base import Solver, evaluate
from diffjax.diffusion.solvers.history import (
    check_order,
    combine,
    exponential_moments,
    extend,
    lagrange_weights,
    new_history,
)
from diffjax.diffusion.solvers.multistep import exponential

# The weights of m_1, m_2, ... on a uniform grid.
_ADAMS_BASHFORTH: tuple[list[float], ...] = ([], [-1 / 2], [-16 / 12, 5 / 12], [-59 / 24, 37 / 24, -9 / 24])


def deis(*, order: int = 2, lower_order_final: bool = True) -> Solver:
    """DEIS with polynomials in log(sigma / alpha) (Zhang and Chen, 2023).

    Args:
      order: how many estimates a step uses, 1 to 4.
      lower_order_final: whether the last of fewer than 15 steps are of lower order.
    """
    check_order(order, 4)

    def moments(h: jax.Array) -> list[list[jax.Array]]:
        every = exponential_moments(h, order)
        return [every[: i + 1] for i in range(order)]

    return exponential(order, moments, of="eps", lower_order_final=lower_order_final)


def lms(*, order: int = 4) -> Solver:
    """Adams-Bashforth for eps in sigma / alpha, on any grid (k-diffusion's linear multistep method).

    Args:
      order: how many estimates a step uses, 1 to 4.
    """
    check_order(order, 4)

    def step(denoise, schedule, x, t, s, keys, history):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        level, length = _noise_level(now), _noise_level(then) - _noise_level(now)
        nodes = [(old - level) / length for old in history.levels]
        moments = [jnp.asarray(1.0 / (i + 1), level.dtype) for i in range(order)]
        rows = [lagrange_weights((0.0, *nodes[:i]), moments[: i + 1])[1:] for i in range(order)]
        change = combine(rows, jnp.minimum(history.done + 1, order), history.values, estimate.eps)
        x = then.alpha * estimate.x0 + then.sigma * estimate.eps + then.alpha * length * change
        return x, extend(history, level, estimate.eps)

    return Solver(lambda x, times: new_history(x, times, order - 1, lower=False), step, order=min(order, 2))


def plms(*, start: str = "heun") -> Solver:
    """PNDM (Liu et al., 2022): DDIM's step with an Adams-Bashforth mean of four eps, on a uniform grid.

    Args:
      start: how it begins: "heun", one step of two evaluations (PLMS), or "runge_kutta", three of four.
    """
    if start not in ("heun", "runge_kutta"):
        raise ValueError(f"start is {start!r}; expected 'heun' or 'runge_kutta'")

    def step(denoise, schedule, x, t, s, keys, history):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        first = estimate.eps

        def move(to: Coeffs, eps: jax.Array) -> jax.Array:
            length = _noise_level(to) - _noise_level(now)
            return to.alpha * estimate.x0 + to.sigma * first + to.alpha * length * (eps - first)

        def begin() -> jax.Array:
            if start == "heun":
                return 0.5 * (first + evaluate(denoise, move(then, first), s).eps)
            middle = schedule(0.5 * (t + s))
            second = evaluate(denoise, move(middle, first), 0.5 * (t + s)).eps
            third = evaluate(denoise, move(middle, second), 0.5 * (t + s)).eps
            fourth = evaluate(denoise, move(then, third), s).eps
            return (first + 2.0 * second + 2.0 * third + fourth) / 6.0

        # Not from where there is no signal, and nothing is evaluated at the last time.
        begins = (history.done < (1 if start == "heun" else 3)) & (now.alpha > 0.0) & (history.left > 1)
        order = jnp.minimum(history.done + 1, 4)
        mean = jax.lax.cond(
            begins, begin, lambda: first + combine(_ADAMS_BASHFORTH, order, history.values, first)
        )
        return move(then, mean), extend(history, t, first)

    return Solver(lambda x, times: new_history(x, times, 3, lower=True), step, order=2)


def _noise_level(coeffs: Coeffs) -> jax.Array:
    """sigma / alpha, kept finite where there is no signal."""
    return coeffs.sigma / jnp.maximum(coeffs.alpha, 1e-6)


SOLVERS: dict[str, Callable[..., Solver]] = {"deis": deis, "lms": lms, "plms": plms}
