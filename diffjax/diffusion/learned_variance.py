"""The reverse process as a chain of Gaussians: its posterior, learned variances, and the variational bound.

A network with a learned variance (improved DDPM; Nichol and Dhariwal, 2021) says where the log-variance of a
reverse step lies between the smallest and the largest that it can have, for every value of the image.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffjax.diffusion.denoiser import Network, evaluate, make_denoiser
from diffjax.diffusion.inputs import Inputs, logsnr_input
from diffjax.diffusion.losses import denoising_loss
from diffjax.diffusion.predictions import Estimate, Prediction
from diffjax.diffusion.schedules import Coeffs, Schedule, corrupt, expand, widen

Decoder = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(x0, mean, log_std) -> -log p(x0)` in nats, elementwise: how the last step scores the data."""

_LOGSNR = logsnr_input()


def posterior(now: Coeffs, then: Coeffs, x: jax.Array, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of q(x_s | x_t, x0) (Ho et al., 2020, equations 6 and 7, for any schedule).

    `mean = q (sigma_s / sigma_t) x_t + alpha_s (1 - q^2) x0`, `variance = sigma_s^2 (1 - q^2)`, where
    `q = (alpha_t / sigma_t) / (alpha_s / sigma_s)`.

    Args:
      now: the schedule at t.
      then: the schedule at the earlier time s.
      x: `x_t`.
      x0: the data, or an estimate of it.
    """
    q, rest = _shares(now, then)
    return q * (then.sigma / now.sigma) * x + then.alpha * rest * x0, then.sigma**2 * rest


def log_variance(schedule: Schedule, t: jax.Array, s: jax.Array, fraction: jax.Array) -> jax.Array:
    """`fraction log(large) + (1 - fraction) log(small)` (Nichol and Dhariwal, 2021, equation 15).

    With q as in `posterior`, large is `sigma_t^2 (1 - q^2)` (DDPM's beta), small the posterior's own,
    `sigma_s^2 (1 - q^2)`. The step to s = 0 ends in the clean image, whatever noise the schedule has there: q
    is 0; small would be 0, and is that of the next step, from `2 t` to t, as in the published code.

    Args:
      schedule: the noise schedule.
      t: times, a scalar or `[batch]`.
      s: the earlier times.
      fraction: `[batch, …]`; see `diffjax.diffusion.predictions.Estimate`.
    """
    now, then, later = (expand(schedule(time), fraction) for time in (t, s, jnp.minimum(2.0 * t - s, 1.0)))
    rest, next_rest, clean = _shares(now, then)[1], _shares(later, now)[1], widen(s, fraction) == 0.0
    large = now.sigma**2 * jnp.where(clean, 1.0, rest)
    small = jnp.where(clean, now.sigma**2 * next_rest, then.sigma**2 * rest)
    small = jnp.where(small > 0.0, small, large)  # a process of one step has no next one
    return fraction * jnp.log(large) + (1.0 - fraction) * jnp.log(small)


def gaussian_kl(
    mean: jax.Array, log_var: jax.Array, other_mean: jax.Array, other_log_var: jax.Array
) -> jax.Array:
    """KL(N(mean, exp(log_var)) || N(other_mean, exp(other_log_var))) in nats, elementwise."""
    gap = log_var - other_log_var
    return 0.5 * (jnp.expm1(gap) - gap + (mean - other_mean) ** 2 * jnp.exp(-other_log_var))


def gaussian_nll(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """`-log N(x; mean, std^2)` in nats, elementwise: the decoder of continuous data."""
    return 0.5 * ((x - mean) * jnp.exp(-log_std)) ** 2 + log_std + 0.5 * math.log(2.0 * math.pi)


def discretized_gaussian_nll(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """`-log P(bin of x)` in nats, elementwise: the decoder of 8-bit images (Ho et al., 2020, equation 13).

    [-1, 1] is 256 bins whose centres are 2/255 apart; the first and the last reach to infinity.
    """
    low, high = ((x - mean + side / 255.0) * jnp.exp(-log_std) for side in (-1.0, 1.0))
    # Both in the lower tail, where a difference of probabilities keeps its precision.
    upper = x > mean
    log_low, log_high = (log_ndtr(jnp.where(upper, *ends)) for ends in ((-high, low), (-low, high)))
    inside = log_high + jnp.log(-jnp.expm1(-jnp.maximum(log_high - log_low, 1e-30)))
    return -jnp.where(x < -0.999, log_ndtr(high), jnp.where(x > 0.999, log_ndtr(-low), inside))


def vlb_term(
    estimate: Estimate,
    schedule: Schedule,
    x0: jax.Array,
    x: jax.Array,
    t: jax.Array,
    s: jax.Array,
    *,
    decoder: Decoder = discretized_gaussian_nll,
) -> jax.Array:
    """What the step from t to s adds to the variational bound, `[batch]`, in bits per dimension.

    `KL(q(x_s | x_t, x0) || p(x_s | x_t))`, or, where s = 0, the decoder's `-log p(x0 | x_t)`, whose mean is
    the estimated x0.

    Args:
      estimate: the denoiser's, at `x_t`; without a fraction the variance is the small one.
      schedule: the noise schedule.
      x0: data in [-1, 1], `[batch, …]`.
      x: `x_t`.
      t: times, a scalar or `[batch]`.
      s: the earlier times.
      decoder: how the last step scores the data.
    """
    none = jnp.zeros_like(x)
    now, then = expand(schedule(t), x), expand(schedule(s), x)
    (true_mean, _), (mean, _) = (posterior(now, then, x, data) for data in (x0, estimate.x0))
    log_var = log_variance(schedule, t, s, none if estimate.fraction is None else estimate.fraction)
    kl = gaussian_kl(true_mean, log_variance(schedule, t, s, none), mean, log_var)
    nll = decoder(x0, estimate.x0, 0.5 * log_var)
    return jnp.mean(jnp.where(widen(s, x) == 0.0, nll, kl), axis=tuple(range(1, x.ndim))) / math.log(2.0)


def hybrid_loss(
    net: Network,
    schedule: Schedule,
    *,
    prediction: Prediction,
    x0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    inputs: Inputs = _LOGSNR,
    num_steps: int = 1000,
    vlb_weight: float = 1e-3,
    **options: Any,
) -> jax.Array:
    """`denoising_loss + vlb_weight num_steps vlb_term` of each example (Nichol and Dhariwal, 2021, eq. 16).

    The bound trains the variance alone: no gradient flows from it into the mean.

    Args:
      net: `(x, time input) -> [batch, …, 2 channels]`, the prediction and the variance.
      schedule: the noise schedule.
      prediction: what the first half of the output means.
      x0: data in [-1, 1], `[batch, …]`.
      eps: standard normal noise of the same shape.
      t: times in [0, 1], `[batch]`; they are rounded up to the grid of `num_steps`.
      inputs: how the network is shown `x_t` and told the noise level.
      num_steps: the steps of the process that the bound is of.
      vlb_weight: of the whole bound, which over uniform times is `num_steps` times the mean of a term.
      **options: of `diffjax.diffusion.losses.denoising_loss`: target, weighting, penalty.
    """
    # The margin keeps a time that is on the grid where it is, whichever way it was rounded.
    step = jnp.clip(jnp.ceil(t * num_steps - 1e-3), 1.0, num_steps)
    t, s = step / num_steps, (step - 1.0) / num_steps
    x = corrupt(schedule, x0, eps, t)
    output, spread = jnp.split(evaluate(net, inputs, schedule(t), x, t), 2, axis=-1)
    simple = denoising_loss(
        lambda *_: output, schedule, prediction=prediction, x0=x0, eps=eps, t=t, **options
    )
    fixed = jnp.concatenate([jax.lax.stop_gradient(output), spread], axis=-1)
    estimate = make_denoiser(lambda *_: fixed, schedule, prediction, learned_variance=True)(x, t)
    return simple + vlb_weight * num_steps * vlb_term(estimate, schedule, x0, x, t, s)


def _shares(now: Coeffs, then: Coeffs) -> tuple[jax.Array, jax.Array]:
    """`q = (alpha_t / sigma_t) / (alpha_s / sigma_s)` and `1 - q^2`."""
    q = now.alpha * then.sigma / (then.alpha * now.sigma)
    return q, jnp.maximum((1.0 - q) * (1.0 + q), 0.0)
