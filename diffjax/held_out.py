"""What a stage makes of pictures that it was not trained on: bits per dimension, and its denoising error."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser, make_denoiser
from diffjax.diffusion.grids import uniform_logsnr
from diffjax.diffusion.resizing import UPSAMPLINGS, downsample
from diffjax.errors import UserError
from diffjax.evaluation import density
from diffjax.evaluation.errorbars import Value, mean_error
from diffjax.stage import Params, Stage, given_cond, to_model_range, with_low_res

Batch = dict[str, jax.Array]

# The density is taken at this log-SNR, where noise is a third of a grey level, not at t = 0, where networks
# that predict the data say nothing of the noise.
_LIMIT = 12.0


def denoiser_of(
    stage: Stage, params: Params, batch: Batch, keys: jax.Array, aug_level: float = 0.0
) -> Denoiser:
    """The stage's denoiser for a batch, given its conditions, without guidance or threshold.

    Args:
      stage: the stage.
      params: the network's parameters.
      batch: `image` or `latent`, and what the stage is conditioned on, as in `stage.draw`.
      keys: a key for each example.
      aug_level: the noise on the low-resolution image of a super-resolution stage.
    """
    x0 = _data(batch)
    cond = given_cond(stage, batch, len(x0), x0.shape[1] * stage.scale)
    if stage.low_res:
        factor = stage.resolution // stage.low_res
        low_res = UPSAMPLINGS[stage.upsampling](downsample(x0, factor), factor)
        eps = noise.normal_like(keys, low_res, draw=1)
        level = jnp.full((len(x0),), aug_level, jnp.float32)
        cond = with_low_res(cond, stage.schedule, low_res, level, eps, stage.inputs)

    def net(x: jax.Array, level: jax.Array) -> jax.Array:
        return stage.net(params, x, level, cond)

    return make_denoiser(
        net, stage.schedule, stage.prediction, stage.inputs, learned_variance=stage.vlb_weight > 0.0
    )


def bits_per_dimension(
    stage: Stage,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    num_steps: int = 32,
    aug_level: float = 0.0,
    seed: int = 0,
) -> Value:
    """Bits per dimension of examples, given their conditions, and its error: 4 num_steps evaluations each.

    Args:
      stage: a stage that diffuses pixels.
      params: the network's parameters.
      batches: of `stage.draw`, none larger than the first.
      num_steps: Runge-Kutta steps of the probability-flow ODE.
      aug_level: as in `denoiser_of`.
      seed: of the noise and of Hutchinson's probes.

    Raises:
      UserError: the stage diffuses latents, whose density says nothing of pictures.
    """
    if stage.scale > 1:
        raise UserError("bits per dimension are of pixels; this stage diffuses latents.")
    times = uniform_logsnr(limit=_LIMIT)(stage.schedule, num_steps)

    @jax.jit
    def bits(params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        denoise = denoiser_of(stage, params, batch, keys, aug_level)
        return density.bits_per_dimension(denoise, stage.schedule, batch["image"], keys=keys, times=times)

    return mean_error(density.over_examples(lambda *given: bits(params, *given), batches, seed=seed))


def denoising_error(
    stage: Stage,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    levels: Sequence[float] = (-8.0, -4.0, 0.0, 4.0, 8.0),
    aug_level: float = 0.0,
    seed: int = 0,
) -> dict[float, Value]:
    """The mean squared error of the estimated data at fixed log-SNR: level -> mean and error over examples.

    Args:
      stage: the stage.
      params: the network's parameters.
      batches: of `stage.draw`, none larger than the first.
      levels: log-SNR.
      aug_level: as in `denoiser_of`.
      seed: of the noise.

    Raises:
      UserError: a level is beyond the schedule's ends.
    """

    @jax.jit
    def errors(params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        denoise = denoiser_of(stage, params, batch, keys, aug_level)
        return density.denoising_error(denoise, stage.schedule, _data(batch), keys=keys, levels=levels)

    found = density.over_examples(lambda *given: errors(params, *given), batches, seed=seed)
    return {level: mean_error(row) for level, row in zip(levels, found, strict=True)}


def _data(batch: Batch) -> jax.Array:
    """What is diffused, as in training."""
    return batch["latent"] if "latent" in batch else to_model_range(batch["image"])
