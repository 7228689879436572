"""Weights of noise levels in the training loss.

Each is published for the squared error of some quantity; it says for which, and the loss converts it to the
space in which the error is measured.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion import predictions
from diffjax.diffusion.predictions import Prediction
from diffjax.diffusion.schedules import Coeffs, logsnr


class Weighting(NamedTuple):
    """A weight, and the space of the squared error that it weighs (None: wherever the error is measured)."""

    weight: Callable[[Coeffs], jax.Array]
    space: Prediction | None = None


def unit() -> Weighting:
    """Every noise level counts the same, in the space in which the error is measured."""
    return Weighting(lambda coeffs: jnp.ones_like(coeffs.alpha))


def min_snr(*, gamma: float = 5.0) -> Weighting:
    """min-SNR-gamma (Hang et al., 2023): `min(SNR, gamma)` for an error of x0."""
    return Weighting(lambda coeffs: jnp.minimum(jnp.exp(logsnr(coeffs)), gamma), predictions.x0)


def sigmoid(*, bias: float = -1.0) -> Weighting:
    """Sigmoid weighting (Kingma and Gao, 2023; Hoogeboom et al., 2024) for an error of eps.

    `sigmoid(bias - logsnr)`, times the constant `1 + exp(-bias)`, which keeps the loss on the scale of the
    others.
    """
    constant = 1.0 + jnp.exp(-bias)
    return Weighting(lambda coeffs: jax.nn.sigmoid(bias - logsnr(coeffs)) * constant, predictions.eps)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {"unit": unit, "min_snr": min_snr, "sigmoid": sigmoid}
