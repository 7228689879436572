"""What multistep solvers have in common: estimates of earlier steps in place of further evaluations.

Each step is DDIM's and the integral of a polynomial through estimates m_0, m_1, ... (latest first):

    x_s = alpha_s x0 + sigma_s eps + gain sum_j w_j (m_j - m_0).

The methods differ only in what is interpolated (x0 or eps), where, and in the moments of the integral.
The first step knows one estimate, so it is DDIM's, and what follows converges at second order whatever its
degree: a higher degree lowers the error.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules import Coeffs

LONG = 5.0
"""A step this many times longer than the one before is too long for the estimates of earlier steps."""


class History(NamedTuple):
    """What a multistep solver remembers, latest first.

    Attributes:
      done: the number of steps done.
      left: the highest order that the number of steps to come allows.
      levels: where on the axis of integration the estimates were made.
      values: the estimates.
    """

    done: jax.Array
    left: jax.Array
    levels: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def new_history(x: jax.Array, times: jax.Array, count: int, *, lower: bool) -> History:
    """An empty history of `count` estimates.

    Args:
      x: gives the shape of the estimates.
      times: the time grid.
      count: how many estimates to remember.
      lower: whether the last steps are of lower order.
    """
    steps = times.shape[0] - 1
    # No two places may ever be the same, or the weights of a degree not yet in use would be NaN.
    levels = tuple(jnp.asarray(-1000.0 * (i + 1), times.dtype) for i in range(count))
    left = jnp.asarray(steps if lower else steps + count)
    return History(jnp.asarray(0), left, levels, (jnp.zeros_like(x),) * count)


def extend(history: History, level: jax.Array, value: jax.Array) -> History:
    """The history after one more step, from `level`, with the estimate `value`."""
    levels, values = (level, *history.levels), (value, *history.values)
    count = len(history.levels)
    return History(history.done + 1, history.left - 1, levels[:count], values[:count])


def usable_order(history: History, order: int, then: Coeffs, level: jax.Array, h: jax.Array) -> jax.Array:
    """The order of a step: as many estimates as are known, and no more than steps are left.

    It is 1 where the step ends without noise, and where it is `LONG` times as long as the one before, as the
    last step of a uniform grid is on a schedule that all but ends without noise: a polynomial continued that
    far multiplies the errors of the network.

    Args:
      history: of the steps before.
      order: the solver's.
      then: where the step ends.
      level: where it begins, on the axis of `history.levels`.
      h: its length; negative where noise is added, as in inversion.
    """
    usable = jnp.minimum(jnp.minimum(history.done + 1, history.left), order)
    alone = then.sigma <= 0.0
    if history.levels:
        alone |= jnp.abs(h) > LONG * jnp.abs(level - history.levels[0])
    return jnp.where(alone, 1, usable)


def exponential_moments(h: jax.Array, count: int) -> list[jax.Array]:
    """`h int_0^1 exp(-h (1 - r)) r^i dr` for i = 0 ... count - 1, to full precision also for a small h."""
    small = jnp.abs(h) < 0.5
    near, far = jnp.where(small, h, 0.0), jnp.where(small, 1.0, h)
    # i! h sum_n (-h)^n / (n + i + 1)!: where h is small the recurrence cancels.
    terms = [
        [math.factorial(i) * (-1.0) ** n / math.factorial(n + i + 1) for i in range(count)] for n in range(11)
    ]
    series = near * jnp.polyval(jnp.asarray(terms[::-1], h.dtype), near)
    result = [-jnp.expm1(-h)]
    for i in range(1, count):
        result.append(jnp.where(small, series[i], 1.0 - i * result[-1] / far))
    return result


def lagrange_weights(nodes: Sequence[jax.Array | float], moments: Sequence[jax.Array]) -> list[jax.Array]:
    """The integral of each node's Lagrange polynomial, given the integrals of 1, r, r^2, ..."""
    weights = []
    for j, node in enumerate(nodes):
        polynomial: list[Any] = [1.0]  # coefficients, constant first
        for other in (*nodes[:j], *nodes[j + 1 :]):
            pairs = itertools.pairwise([0.0, *polynomial, 0.0])
            polynomial = [(below - other * here) / (node - other) for below, here in pairs]
        weights.append(jnp.asarray(sum(c * m for c, m in zip(polynomial, moments, strict=True))))
    return weights


def combine(
    rows: Sequence[Sequence[jax.Array | float]], order: jax.Array, values: Sequence[jax.Array], m0: jax.Array
) -> jax.Array:
    """`sum_j w_j (m_j - m_0)` with the weights `rows[order - 1]`; a row may be shorter than the values."""
    padded = [[*row, *[0.0] * (len(values) - len(row))] for row in rows]
    table = jnp.asarray(padded, m0.dtype).reshape(len(rows), len(values))
    return sum((w * (m - m0) for w, m in zip(table[order - 1], values, strict=True)), jnp.zeros_like(m0))


def check_order(order: int, largest: int) -> None:
    """Refuse an order that is not one of 1 ... largest."""
    if order not in range(1, largest + 1):
        raise ValueError(f"order is {order}; expected 1 to {largest}")
