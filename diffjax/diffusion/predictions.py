"""What a network predicts, as a row `(a, b)`: prediction = a x0 + b eps.

Together with `x_t = alpha x0 + sigma eps`, any row is one 2x2 system, which `solve` inverts. The loss and the
samplers use the same rows, so no pair of predictions needs a converter of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules import Coeffs


class Row(NamedTuple):
    """Coefficients of a prediction in terms of the data and the noise."""

    a: jax.Array
    b: jax.Array


class Estimate(NamedTuple):
    """A consistent pair of estimates of the data and of the noise in `x_t`."""

    x0: jax.Array
    eps: jax.Array


Prediction = Callable[[Coeffs], Row]


def x0(coeffs: Coeffs) -> Row:
    """The data itself."""
    return Row(jnp.ones_like(coeffs.alpha), jnp.zeros_like(coeffs.sigma))


def eps(coeffs: Coeffs) -> Row:
    """The noise (Ho et al., 2020)."""
    return Row(jnp.zeros_like(coeffs.alpha), jnp.ones_like(coeffs.sigma))


def v(coeffs: Coeffs) -> Row:
    """`alpha eps - sigma x0` (Salimans and Ho, 2022)."""
    return Row(-coeffs.sigma, coeffs.alpha)


def velocity(coeffs: Coeffs) -> Row:
    """The time derivative of the path, `alpha' x0 + sigma' eps` (flow matching)."""
    return Row(coeffs.d_alpha, coeffs.d_sigma)


def score(coeffs: Coeffs) -> Row:
    """The gradient of the log-density of `x_t` given x0, `-eps / sigma`."""
    return Row(jnp.zeros_like(coeffs.alpha), -1.0 / coeffs.sigma)


PREDICTIONS: dict[str, Prediction] = {"x0": x0, "eps": eps, "v": v, "velocity": velocity, "score": score}


def solve(row: Row, coeffs: Coeffs, x: jax.Array, prediction: jax.Array) -> Estimate:
    """Recover x0 and eps from `x_t` and a prediction.

    Args:
      row: the prediction's row at this time; broadcasts against `x`.
      coeffs: the schedule at this time; broadcasts against `x`.
      x: `x_t`.
      prediction: the network's output, of the shape of `x`.
    """
    determinant = coeffs.alpha * row.b - coeffs.sigma * row.a
    return Estimate(
        x0=(row.b * x - coeffs.sigma * prediction) / determinant,
        eps=(coeffs.alpha * prediction - row.a * x) / determinant,
    )


def combine(row: Row, estimate: Estimate) -> jax.Array:
    """Evaluate a row: `a x0 + b eps`."""
    return row.a * estimate.x0 + row.b * estimate.eps
