"""The training loss: a weighted squared error in the space of any prediction."""

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Network, make_denoiser
from diffjax.diffusion.predictions import Estimate, Prediction, combine
from diffjax.diffusion.schedules import Schedule, corrupt, expand, logsnr
from diffjax.diffusion.weightings import Weighting


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
) -> jax.Array:
    """The loss of each example.

    The network may predict one quantity and be penalised in another (JiT predicts x0 and is penalised
    in velocity). Where `prediction` and `target` are the same row, this is the squared error of the output.

    Args:
      net: `(x_t, log-SNR) -> prediction`.
      schedule: the noise schedule.
      prediction: what the network's output means.
      target: the row in which the error is measured.
      weighting: the weight of a noise level.
      x0: data, `[batch, …]`.
      eps: standard normal noise of the same shape.
      t: times in [0, 1], `[batch]`.

    Returns:
      `[batch]`: the mean over all axes but the first of the weighted squared error.
    """
    x = corrupt(schedule, x0, eps, t)
    coeffs = schedule(t)
    wide = expand(coeffs, x0)
    if prediction is target:
        # Without the detour over x0 and eps, which would lose precision near the ends.
        output = net(x, logsnr(coeffs)).astype(jnp.float32)
        error = output - combine(target(wide), Estimate(x0, eps))
    else:
        estimate = make_denoiser(net, schedule, prediction)(x, t)
        error = combine(target(wide), Estimate(estimate.x0 - x0, estimate.eps - eps))
    return weighting(coeffs) * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
