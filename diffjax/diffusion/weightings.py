"""Weights of noise levels in the training loss: functions of the schedule's coefficients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules import Coeffs, logsnr

Weighting = Callable[[Coeffs], jax.Array]


def unit() -> Weighting:
    """Every noise level counts the same, in the space in which the error is measured."""
    return lambda coeffs: jnp.ones_like(coeffs.alpha)


def min_snr(*, gamma: float = 5.0) -> Weighting:
    """min-SNR-gamma (Hang et al., 2023) for an error measured in v: `min(SNR, gamma) / (SNR + 1)`.

    The paper weights the error of x0 by `min(SNR, gamma)`; since `|v error|^2 = (SNR + 1) |x0 error|^2` under
    a variance-preserving schedule, the same weight reads so in the space of v.
    """

    def weight(coeffs: Coeffs) -> jax.Array:
        snr = jnp.exp(logsnr(coeffs))
        return jnp.minimum(snr, gamma) / (snr + 1.0)

    return weight


def sigmoid(*, bias: float = -1.0) -> Weighting:
    """Sigmoid weighting (Kingma and Gao, 2023; Hoogeboom et al., 2024) for an error measured in v.

    The papers weight the error of eps by `sigmoid(bias - logsnr)`. Under a variance-preserving schedule
    `|eps error|^2 = alpha^2 |v error|^2`, so the same weight reads `alpha^2 sigmoid(bias - logsnr)` in the
    space of v. The constant `1 + exp(-bias)` keeps the loss on the scale of the others.
    """

    def weight(coeffs: Coeffs) -> jax.Array:
        return coeffs.alpha**2 * jax.nn.sigmoid(bias - logsnr(coeffs)) * (1.0 + jnp.exp(-bias))

    return weight


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {"unit": unit, "min_snr": min_snr, "sigmoid": sigmoid}
