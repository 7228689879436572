"""Rules of guidance: how the estimates with and without a condition are combined.

Two estimates of the same `x_t` differ by `sigma k` in x0, by `-alpha k` in eps, and in a prediction with the
row (a, b) by -k times its determinant. The rules work on k, so nothing is divided by what vanishes at an end.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine, determinant
from diffjax.diffusion.schedules import Coeffs


class Guidance(NamedTuple):
    """A way to combine two estimates.

    Attributes:
      rule: `(positive, negative, coeffs, scale) -> Estimate`; coeffs and scale broadcast against x0.
      off_at: the scale at which the result is the positive; None if there is none.
    """

    rule: Callable[[Estimate, Estimate, Coeffs, jax.Array], Estimate]
    off_at: float | None = 1.0


def classifier_free() -> Guidance:
    """`negative + scale (positive - negative)` (Ho and Salimans, 2022), of x0 and of eps alike."""
    return Guidance(_extrapolate)


def rescaled(*, phi: float = 0.7, space: str = "v") -> Guidance:
    """Classifier-free guidance with the contrast of the positive (Lin et al., 2024).

    The guided prediction is multiplied by `phi std(positive) / std(guided) + 1 - phi`, for each example.

    Args:
      phi: in [0, 1].
      space: the prediction that is rescaled, a name of `PREDICTIONS`; in the paper what the network predicts.
        It must not be singular where it is used (eps is without signal, x0 without noise).
    """
    _require(0.0 <= phi <= 1.0, f"phi is {phi}; expected a number in [0, 1]")
    row_of = _space(space)

    def rule(positive: Estimate, negative: Estimate, coeffs: Coeffs, scale: jax.Array) -> Estimate:
        result, row = _extrapolate(positive, negative, coeffs, scale), row_of(coeffs)
        output = combine(row, result)
        axes = tuple(range(1, output.ndim))
        wanted, had = (p.std(axis=axes, keepdims=True) for p in (combine(row, positive), output))
        change = phi * (wanted / jnp.maximum(had, 1e-12) - 1.0) * output
        return moved(result, coeffs, -change / determinant(row, coeffs))

    return Guidance(rule)


def apg(
    *, eta: float = 0.0, norm_threshold: float = 15.0, space: str = "x0", from_negative: bool = False
) -> Guidance:
    """Adaptive projected guidance (Sadat et al., 2025): less saturation at high scales.

    `positive + (scale - 1) (d_orthogonal + eta d_parallel)`, with `d = positive - negative` split along the
    positive in each example. Its momentum is `guidance.with_momentum`.

    Args:
      eta: in [0, 1]; 1 keeps the parallel part.
      norm_threshold: d is shortened to this norm, which grows with the size of x (15: SDXL's latents).
      space: the prediction that it acts on, a name of `PREDICTIONS`.
      from_negative: diffusers' default, `negative + scale (d_orthogonal + eta d_parallel)`; no scale is off.
    """
    _require(0.0 <= eta <= 1.0, f"eta is {eta}; expected a number in [0, 1]")
    _require(norm_threshold > 0.0, f"norm_threshold is {norm_threshold}; expected more than 0")
    row_of = _space(space)

    def rule(positive: Estimate, negative: Estimate, coeffs: Coeffs, scale: jax.Array) -> Estimate:
        row, along = row_of(coeffs), combine(row_of(coeffs), positive)
        k = coeffs.sigma * (positive.x0 - negative.x0) - coeffs.alpha * (positive.eps - negative.eps)
        k = k / (coeffs.alpha**2 + coeffs.sigma**2)
        k = k * jnp.minimum(1.0, norm_threshold / _norm(determinant(row, coeffs) * k))
        along = along / _norm(along)
        k = k - (1.0 - eta) * (k * along).sum(axis=tuple(range(1, k.ndim)), keepdims=True) * along
        if from_negative:
            return moved(negative, coeffs, scale * k)._replace(fraction=positive.fraction)
        return moved(positive, coeffs, (scale - 1.0) * k)

    return Guidance(rule, off_at=None if from_negative else 1.0)


def cfg_plus_plus() -> Guidance:
    """CFG++ (Chung et al., 2025): x0 is guided with a scale in [0, 1], eps is the negative's.

    Inconsistent with `x_t` on purpose, and meant for DDIM, which adds the noise eps to x0. No scale is off.
    """

    def rule(positive: Estimate, negative: Estimate, coeffs: Coeffs, scale: jax.Array) -> Estimate:
        return _extrapolate(positive, negative, coeffs, scale)._replace(eps=negative.eps)

    return Guidance(rule, off_at=None)


GUIDANCES: dict[str, Callable[..., Guidance]] = {
    "classifier_free": classifier_free,
    "rescaled": rescaled,
    "apg": apg,
    "cfg_plus_plus": cfg_plus_plus,
}


def moved(estimate: Estimate, coeffs: Coeffs, k: jax.Array) -> Estimate:
    """Another estimate of the same `x_t`: `x0 + sigma k`, `eps - alpha k`."""
    return estimate._replace(x0=estimate.x0 + coeffs.sigma * k, eps=estimate.eps - coeffs.alpha * k)


def _extrapolate(positive: Estimate, negative: Estimate, coeffs: Coeffs, scale: jax.Array) -> Estimate:
    x0, eps = (n + scale * (p - n) for p, n in zip(positive[:2], negative[:2], strict=True))
    return Estimate(x0, eps, positive.fraction)


def _norm(values: jax.Array) -> jax.Array:
    """The norm of each example, kept from zero."""
    squares = (values**2).sum(axis=tuple(range(1, values.ndim)), keepdims=True)
    return jnp.maximum(jnp.sqrt(squares), 1e-12)


def _space(name: str) -> Callable:
    _require(name in PREDICTIONS, f"space is {name!r}; expected one of {sorted(PREDICTIONS)}")
    return PREDICTIONS[name]()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
