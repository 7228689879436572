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
    """A consistent pair of estimates of the data and of the noise in `x_t`.

    Attributes:
      x0: the data.
      eps: the noise.
      fraction: where the variance was learned, its place between the smallest (0) and the largest (1) that a
        reverse step can have, of the shape of x0; see `diffjax.diffusion.learned_variance`.
    """

    x0: jax.Array
    eps: jax.Array
    fraction: jax.Array | None = None


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


def edm(*, sigma_data: float = 0.5) -> Prediction:
    """EDM's F (Karras et al., 2022), `x0 = c_skip x + c_out F`, for any schedule.

    With `n^2 = sigma^2 + alpha^2 sigma_data^2` the paper's table reads `F = (sigma x0 / sigma_data - alpha
    sigma_data eps) / n`: x0 where there is only noise, the negative noise where there is only data. Where
    the schedule preserves variance and sigma_data is 1, F is -v.

    Args:
      sigma_data: the standard deviation of the data.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data is {sigma_data}; expected more than 0")

    def row(coeffs: Coeffs) -> Row:
        size = jnp.hypot(coeffs.sigma, coeffs.alpha * sigma_data)
        return Row(coeffs.sigma / (sigma_data * size), -coeffs.alpha * sigma_data / size)

    return row


PREDICTIONS: dict[str, Callable[..., Prediction]] = {
    "x0": lambda: x0,
    "eps": lambda: eps,
    "v": lambda: v,
    "velocity": lambda: velocity,
    "score": lambda: score,
    "edm": edm,
}


def determinant(row: Row, coeffs: Coeffs) -> jax.Array:
    """`alpha b - sigma a`; where it is zero, the prediction says nothing that `x_t` does not say already.

    For the same `x_t`, errors of two predictions are to each other as their determinants.
    """
    return coeffs.alpha * row.b - coeffs.sigma * row.a


def solve(row: Row, coeffs: Coeffs, x: jax.Array, prediction: jax.Array) -> Estimate:
    """Recover x0 and eps from `x_t` and a prediction.

    Args:
      row: the prediction's row at this time; broadcasts against `x`.
      coeffs: the schedule at this time; broadcasts against `x`.
      x: `x_t`.
      prediction: the network's output, of the shape of `x`.
    """
    size = determinant(row, coeffs)
    return Estimate(
        x0=(row.b * x - coeffs.sigma * prediction) / size,
        eps=(coeffs.alpha * prediction - row.a * x) / size,
    )


def combine(row: Row, estimate: Estimate) -> jax.Array:
    """Evaluate a row: `a x0 + b eps`."""
    return row.a * estimate.x0 + row.b * estimate.eps
