"""The training loss: a weighted penalty of the error, in the space of any prediction."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Network, evaluate
from diffjax.diffusion.inputs import Inputs, logsnr_input
from diffjax.diffusion.predictions import Estimate, Prediction, combine, determinant
from diffjax.diffusion.schedules import Coeffs, Schedule, corrupt, expand
from diffjax.diffusion.weightings import Weighting


class BatchLoss(NamedTuple):
    """The training loss of a batch, `[batch]` each.

    Attributes:
      objective: what is minimised: the loss with the weight of importance sampling and the uncertainty.
      loss: the loss itself.
      t: the times that were drawn.
      logsnr: the noise levels at these times.
    """

    objective: jax.Array
    loss: jax.Array
    t: jax.Array
    logsnr: jax.Array


Penalty = Callable[[jax.Array], jax.Array]
"""`error -> penalty`, elementwise; `squared` is the usual one."""

_LOGSNR = logsnr_input()


def squared() -> Penalty:
    """The squared error."""
    return lambda error: error**2


def huber(*, delta: float = 1.0) -> Penalty:
    """Quadratic up to `delta`, linear beyond: `error^2`, `2 delta |error| - delta^2`."""

    def penalty(error: jax.Array) -> jax.Array:
        size = jnp.abs(error)
        return jnp.where(size <= delta, error**2, 2.0 * delta * size - delta**2)

    return penalty


def pseudo_huber(*, c: float = 0.03) -> Penalty:
    """`2 c (sqrt(error^2 + c^2) - c)`, a smooth Huber loss (Song and Dhariwal, 2024; Khrapov et al., 2024).

    Equal to the squared error where that is small against c^2.
    """
    # Written so that a small error does not cancel.
    return lambda error: 2.0 * c * error**2 / (jnp.sqrt(error**2 + c**2) + c)


PENALTIES: dict[str, Callable[..., Penalty]] = {
    "squared": squared,
    "huber": huber,
    "pseudo_huber": pseudo_huber,
}

_SQUARED = squared()


def error_ratio(coeffs: Coeffs, target: Prediction, prediction: Prediction) -> jax.Array:
    """How many times larger an error is in `target` than the same error in `prediction`, with its sign.

    Both describe the same x_t, so an error of x0 by `sigma k` is one of eps by `-alpha k`, and one of any row
    by -k times its determinant: no need to go through x0 and eps, which would lose precision near the ends.
    """
    if target is prediction:
        return jnp.ones_like(coeffs.alpha)
    return determinant(target(coeffs), coeffs) / determinant(prediction(coeffs), coeffs)


def loss_weight(coeffs: Coeffs, weighting: Weighting, target: Prediction) -> jax.Array:
    """A weighting, published for whichever space, as the weight of a squared error measured in `target`."""
    space = weighting.space or target
    return weighting.weight(coeffs) * error_ratio(coeffs, space, target) ** 2


def denoising_loss(
    net: Network,
    schedule: Schedule,
    *,
    prediction: Prediction,
    target: Prediction,
    weighting: Weighting,
    x0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    inputs: Inputs = _LOGSNR,
    penalty: Penalty = _SQUARED,
) -> jax.Array:
    """The loss of each example.

    The network may predict one quantity and be penalised in another (JiT predicts x0 and is penalised
    in velocity). Where `prediction` and `target` are the same row, this is the penalty of the output's error.

    Args:
      net: `(x, time input) -> prediction`.
      schedule: the noise schedule.
      prediction: what the network's output means.
      target: the row in which the error is measured.
      weighting: the weight of a noise level.
      x0: data, `[batch, …]`.
      eps: standard normal noise of the same shape.
      t: times in [0, 1], `[batch]`.
      inputs: how the network is shown `x_t` and told the noise level.
      penalty: of an error.

    Returns:
      `[batch]`: the mean over all axes but the first of the weighted penalty.
    """
    coeffs = schedule(t)
    output = evaluate(net, inputs, coeffs, corrupt(schedule, x0, eps, t), t)
    wide = expand(coeffs, x0)
    error = output - combine(prediction(wide), Estimate(x0, eps))
    error = error * error_ratio(wide, target, prediction)
    weight = loss_weight(coeffs, weighting, target)
    return weight * jnp.mean(penalty(error), axis=tuple(range(1, error.ndim)))
