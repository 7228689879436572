"""Weights of noise levels in the training loss.

Each is published for the squared error of some quantity; it says for which, and the loss converts it to the
space in which the error is measured. Where a published weight is infinite at an end of the schedule, it is
written here for another quantity, for which the same weight is finite.
"""

import math
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
    return Weighting(_ones)


def snr() -> Weighting:
    """`SNR` for an error of x0, which is 1 for one of eps: DDPM's simple loss (Ho et al., 2020)."""
    return Weighting(_ones, predictions.eps)


def truncated_snr() -> Weighting:
    """`max(SNR, 1)` for an error of x0 (Salimans and Ho, 2022)."""

    def weight(coeffs: Coeffs) -> jax.Array:
        # In v, whose error is that of x0 times (alpha^2 + sigma^2) / sigma.
        return jnp.maximum(coeffs.alpha, coeffs.sigma) ** 2 / (coeffs.alpha**2 + coeffs.sigma**2) ** 2

    return Weighting(weight, predictions.v)


def min_snr(*, gamma: float = 5.0) -> Weighting:
    """min-SNR-gamma (Hang et al., 2023): `min(SNR, gamma)` for an error of x0."""
    _check_positive(gamma=gamma)
    return Weighting(lambda coeffs: jnp.minimum(jnp.exp(logsnr(coeffs)), gamma), predictions.x0)


def soft_min_snr(*, gamma: float = 4.0) -> Weighting:
    """`SNR gamma / (SNR + gamma)` for an error of x0, a smooth `min_snr` (Crowson et al., 2024: HDiT).

    k-diffusion states it as `(sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2` for an error of EDM's F, with
    gamma = 1 / sigma_data^2: 4 for EDM's sigma_data of 0.5.
    """
    _check_positive(gamma=gamma)

    def weight(coeffs: Coeffs) -> jax.Array:
        return gamma * coeffs.alpha**2 / (coeffs.alpha**2 + gamma * coeffs.sigma**2)

    return Weighting(weight, predictions.x0)


def edm(*, sigma_data: float = 0.5) -> Weighting:
    """EDM's (Karras et al., 2022): 1 for an error of F.

    With `s = sigma / alpha`, this is `(s^2 + sigma_data^2) / (s sigma_data)^2` for an error of x0.
    """
    return Weighting(_ones, predictions.edm(sigma_data=sigma_data))


def p2(*, k: float = 1.0, gamma: float = 1.0) -> Weighting:
    """Perception prioritised (Choi et al., 2022): `1 / (k + SNR)^gamma` for an error of eps."""
    _check_positive(k=k)
    if not gamma >= 0.0:
        raise ValueError(f"gamma is {gamma}; expected at least 0")

    def weight(coeffs: Coeffs) -> jax.Array:
        return (coeffs.sigma**2 / (k * coeffs.sigma**2 + coeffs.alpha**2)) ** gamma

    return Weighting(weight, predictions.eps)


def sigmoid(*, bias: float = -1.0) -> Weighting:
    """Sigmoid weighting (Kingma and Gao, 2023; Hoogeboom et al., 2024) for an error of eps.

    `sigmoid(bias - logsnr)`, times the constant `1 + exp(-bias)`, which keeps the loss on the scale of the
    others.
    """
    constant = 1.0 + math.exp(-bias)
    return Weighting(lambda coeffs: jax.nn.sigmoid(bias - logsnr(coeffs)) * constant, predictions.eps)


def sigma_sqrt() -> Weighting:
    """`1 / sigma^2` for an error of x0 (Esser et al., 2024; diffusers), where alpha + sigma = 1.

    Any other schedule is scaled to that. On the straight path it is 1 for an error of velocity.
    """

    def weight(coeffs: Coeffs) -> jax.Array:
        # In v, as above.
        return ((coeffs.alpha + coeffs.sigma) / (coeffs.alpha**2 + coeffs.sigma**2)) ** 2

    return Weighting(weight, predictions.v)


def cosmap() -> Weighting:
    """`2 / (pi (1 - 2 sigma + 2 sigma^2))` where alpha + sigma = 1 (Esser et al., 2024), for any error.

    Any other schedule is scaled to that. It is the density of the `cosmap` times.
    """

    def weight(coeffs: Coeffs) -> jax.Array:
        return 2.0 / math.pi * (coeffs.alpha + coeffs.sigma) ** 2 / (coeffs.alpha**2 + coeffs.sigma**2)

    return Weighting(weight)


def velocity_clipped(*, min_sigma: float = 0.05) -> Weighting:
    """JiT's (Li and He, 2025): `1 / max(sigma, min_sigma)^2` for an error of x0, on the straight path.

    An error of velocity is one of x0 times `(alpha sigma' - sigma alpha') / sigma`. The weight is 1 for an
    error of velocity, but with the last sigma not below `min_sigma`, so that the loss stays finite near the
    data where a network predicts x0.
    """
    _check_positive(min_sigma=min_sigma)

    def weight(coeffs: Coeffs) -> jax.Array:
        size = predictions.determinant(predictions.velocity(coeffs), coeffs)
        return (size / jnp.maximum(coeffs.sigma, min_sigma)) ** 2

    return Weighting(weight, predictions.x0)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "unit": unit,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "edm": edm,
    "p2": p2,
    "sigmoid": sigmoid,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
    "velocity_clipped": velocity_clipped,
}


def _ones(coeffs: Coeffs) -> jax.Array:
    return jnp.ones_like(coeffs.alpha)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{name} is {value}; expected more than 0")
