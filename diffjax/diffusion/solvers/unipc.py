"""UniPC: a multistep exponential integrator whose every step is corrected by the next evaluation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.solvers.base import Solver, evaluate, half_logsnr
from diffjax.diffusion.solvers.history import (
    History,
    check_order,
    combine,
    exponential_moments,
    extend,
    lagrange_weights,
    new_history,
    usable_order,
)


class Memory(NamedTuple):
    """What UniPC remembers.

    Attributes:
      history: of the estimates of x0.
      order: of the last step.
      base: that step, had it been of first order: what the corrector starts from.
    """

    history: History
    order: jax.Array
    base: jax.Array


def unipc(
    *, order: int = 2, variant: str = "bh2", corrector: bool = True, lower_order_final: bool = True
) -> Solver:
    """UniPC (Zhao et al., 2023), in terms of x0: one evaluation a step, which also corrects the step before.

    `x_s = sigma_s / sigma_t x_t + alpha_s (E0 m_0 + sum_j w_j (m_j - m_0))`, where the w_j integrate the
    polynomial through estimates m_j of x0: the latest ones in the predictor; in the corrector also that at s
    itself, which raises the order by one, but to no more than 3, as the first step is a corrected DDIM step.

    Args:
      order: how many estimates the predictor uses, 1 to 3.
      variant: of the approximation for two estimates, whose second moment is B / 2 with `B = h` ("bh1") or
        `B = 1 - exp(-h)` ("bh2").
      corrector: whether to correct.
      lower_order_final: whether the last steps are of lower order, the very last of first. One that ends at
        sigma = 0 is of first order in any case.
    """
    check_order(order, 3)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant is {variant!r}; expected 'bh1' or 'bh2'")

    def moments(h: jax.Array, count: int) -> list[list[jax.Array]]:
        """Those for 1 … count estimates; the exact ones but for two estimates."""
        every = exponential_moments(h, count)
        rows = [every[:n] for n in range(1, count + 1)]
        if count > 1:
            rows[1] = [every[0], 0.5 * (h if variant == "bh1" else every[0])]
        return rows

    def init(x: jax.Array, times: jax.Array) -> Memory:
        history = new_history(x, times, order, lower=lower_order_final)
        return Memory(history, jnp.asarray(1), jnp.zeros_like(x))

    def correct(memory: Memory, x, level, alpha, value) -> jax.Array:
        (last, *levels), (m0, *values) = memory.history.levels, memory.history.values
        h = level - last
        nodes = (0.0, 1.0, *[(old - last) / h for old in levels])
        rows = [lagrange_weights(nodes[: n + 2], row)[1:] for n, row in enumerate(moments(h, order + 1)[1:])]
        corrected = memory.base + alpha * combine(rows, memory.order, (value, *values), m0)
        return jnp.where(memory.history.done > 0, corrected, x)

    def step(denoise, schedule, x, t, s, keys, memory):
        m0, now, then = evaluate(denoise, x, t).x0, schedule(t), schedule(s)
        level = half_logsnr(now)
        if corrector:
            x = correct(memory, x, level, now.alpha, m0)
        h = half_logsnr(then) - level
        nodes = [(old - level) / h for old in memory.history.levels[: order - 1]]
        rows = [lagrange_weights((0.0, *nodes[:n]), row)[1:] for n, row in enumerate(moments(h, order))]
        now_order = usable_order(memory.history, order, then, level, h)
        change = combine(rows, now_order, memory.history.values[: order - 1], m0)
        base = then.alpha * m0 + then.sigma * (x - now.alpha * m0) / now.sigma
        return base + then.alpha * change, Memory(extend(memory.history, level, m0), now_order, base)

    if lower_order_final:
        converges = min(order + corrector, 2)
    else:
        converges = min(order + 1, 3) if corrector else min(order, 2)
    return Solver(init, step, order=converges)


SOLVERS: dict[str, Callable[..., Solver]] = {"unipc": unipc}
