"""Moving averages of the parameters: as they are kept in training, and as they are made afterwards.

After EDM2 (Karras et al., 2024): the weight of the parameters of step tau in the power-function average at
step t is `(gamma + 1) tau^gamma / t^(gamma + 1)`, whose width relative to t is `sigma_rel`. From snapshots of
two such averages, that of any other width can be reconstructed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIGMA_REL = 0.1
"""The width of a power-function average, if none is given."""

Decay = Callable[[jax.Array], jax.Array]
"""`step -> decay`, where the first update has step 0."""


def update(average: Any, value: Any, decay: jax.Array) -> Any:
    """`average + (1 - decay) (value - average)`, on trees."""
    return jax.tree.map(lambda a, v: a + (1.0 - decay) * (v - a), average, value)


def decay_at(step: jax.Array, decay: float) -> jax.Array:
    """The average's decay at an update: `min(decay, (1 + step) / (10 + step))`.

    The warm-up lets the average forget the initial parameters; it is TensorFlow's `num_updates` rule.
    """
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def warm(*, decay: float = 0.9999) -> Decay:
    """A constant decay, after TensorFlow's warm-up; see `decay_at`."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay is {decay}; expected at least 0 and less than 1")
    return lambda step: decay_at(step, decay)


def inverse_power(*, decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2.0 / 3.0) -> Decay:
    """`min(decay, 1 - (1 + step / inv_gamma)^-power)` (Crowson; diffusers' `EMAModel`).

    Power 2/3 is for runs of a million steps or more, 3/4 for shorter ones.
    """
    if not 0.0 <= decay < 1.0 or not inv_gamma > 0.0 or not power > 0.0:
        given = f"decay is {decay}, inv_gamma is {inv_gamma}, power is {power}"
        raise ValueError(f"{given}; expected 0 <= decay < 1 and the others above 0")

    def at(step: jax.Array) -> jax.Array:
        return jnp.minimum(decay, -jnp.expm1(-power * jnp.log1p(step.astype(jnp.float32) / inv_gamma)))

    return at


def power_function(*, sigma_rel: float = SIGMA_REL) -> Decay:
    """EDM2's `beta(t) = (1 - 1 / t)^(gamma + 1)`, where t counts from 1: the first value replaces the start.

    Args:
      sigma_rel: the width of the average relative to the length of training, at any time of training.
    """
    gamma = gamma_of(sigma_rel)
    return lambda step: jnp.exp((gamma + 1.0) * jnp.log1p(-1.0 / (step.astype(jnp.float32) + 1.0)))


DECAYS: dict[str, Callable[..., Decay]] = {
    "warm": warm,
    "inverse_power": inverse_power,
    "power_function": power_function,
}


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power-function average of width `sigma_rel`.

    The largest root of `(gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1`.
    """
    if not 0.0 < sigma_rel <= 12.0**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}; expected more than 0 and at most {12.0**-0.5:.4f}")
    square = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real.max())


def reconstruction_weights(
    steps: np.ndarray, gammas: np.ndarray, target_step: float, target_gamma: float
) -> np.ndarray:
    """Weights of snapshots whose sum comes closest to another power-function average.

    The least-squares fit of the profiles (EDM2, algorithm 3), scaled to sum to one.

    Args:
      steps: after how many updates each snapshot was taken, `[n]`.
      gammas: the exponent of each snapshot's average, `[n]`; snapshots of two exponents are enough.
      target_step: the step of the average that is wanted, at most the largest of `steps`.
      target_gamma: its exponent; see `gamma_of`.
    """
    steps, gammas = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    if not 0.0 < target_step <= steps.max():
        raise ValueError(f"target_step is {target_step}; expected more than 0 and at most {steps.max():g}")
    products = _product(steps[:, None], gammas[:, None], steps, gammas)
    target = _product(steps, gammas, target_step, target_gamma)
    # Profiles of unit length, or late and early snapshots would differ in scale by orders of magnitude.
    lengths = np.sqrt(np.diagonal(products))
    fit = np.linalg.lstsq(products / np.outer(lengths, lengths), target / lengths, rcond=None)[0] / lengths
    return fit / fit.sum()


def reconstruction_error(
    steps: np.ndarray, gammas: np.ndarray, weights: np.ndarray, target_step: float, target_gamma: float
) -> float:
    """How far the weighted sum of profiles is from the one that is wanted, relative to its norm.

    Args:
      steps: as for `reconstruction_weights`.
      gammas: the same.
      weights: what that returned.
      target_step: as for `reconstruction_weights`.
      target_gamma: the same.
    """
    steps, gammas = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    own = _product(target_step, target_gamma, target_step, target_gamma)
    cross = _product(steps, gammas, target_step, target_gamma) @ weights
    between = weights @ _product(steps[:, None], gammas[:, None], steps, gammas) @ weights
    return float(np.sqrt(max(between - 2.0 * cross + own, 0.0) / own))


def reconstruct(trees: Iterable[Any], weights: np.ndarray) -> Any:
    """The weighted sum of snapshots, in float64 on the host; `trees` may be a generator that loads them."""
    tree = total = None
    for tree, weight in zip(trees, weights, strict=True):
        part = jax.tree.map(lambda leaf, weight=weight: weight * np.asarray(leaf, np.float64), tree)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, tree)


def _product(step_a: Any, gamma_a: Any, step_b: Any, gamma_b: Any) -> np.ndarray:
    """The integral of the product of two profiles; each is zero beyond its own step."""
    early, late = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    gamma = np.where(step_a < step_b, gamma_b, gamma_a)  # of the later
    size = (gamma_a + 1.0) * (gamma_b + 1.0) / ((gamma_a + gamma_b + 1.0) * late)
    return size * np.exp(gamma * (np.log(early) - np.log(late)))
