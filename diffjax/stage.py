"""One stage of a cascade: a network with its process, and what it is conditioned on.

The training loss and the sampler of a stage are here side by side, because they must agree: on the schedule,
on the meaning of the network's output, and on how a low-resolution image reaches the network.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.diffusion import guidance, noise, resampling, sampling, thresholding
from diffjax.diffusion.couplings import Coupling, independent
from diffjax.diffusion.denoiser import Denoiser, make_denoiser
from diffjax.diffusion.grids import TimeGrid, check_grid, uniform
from diffjax.diffusion.guidance_rules import Guidance, classifier_free
from diffjax.diffusion.inputs import Inputs, logsnr_input
from diffjax.diffusion.learned_variance import hybrid_loss
from diffjax.diffusion.levels import uncertain
from diffjax.diffusion.losses import BatchLoss, Penalty, denoising_loss, squared
from diffjax.diffusion.predictions import Prediction
from diffjax.diffusion.resampling import LossHistory
from diffjax.diffusion.resizing import UPSAMPLINGS, downsample
from diffjax.diffusion.schedules import Schedule, corrupt, logsnr
from diffjax.diffusion.solvers import Solver
from diffjax.diffusion.timesteps import TimeSampler
from diffjax.diffusion.weightings import Weighting
from diffjax.nn.conditioning import Cond, drop_cond, null_cond

Params = Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's objects.

    Attributes:
      net: `(params, x, time_input, cond, dropout_key=None) -> prediction`; the key is given in training.
      schedule: the noise schedule, also of the noise on low-resolution images.
      prediction: what the network's output means.
      target: where the training error is measured.
      weighting: weights of noise levels in training.
      times: which times are drawn in training.
      inputs: how the network is shown `x_t` and told the noise level.
      penalty: of an error.
      coupling: which noise goes with which image of a batch.
      vlb_weight: where the network also learns the variance (twice the channels), the weight of the
        variational bound in the loss; 0 where it does not.
      uncertainty: `(params, logsnr) -> u`, by which the loss is `loss exp(-u) + u` (EDM2), or None.
      resolution: side of the images that it makes, in pixels.
      conditions: what the network is told besides: any of "text", "label", "size" (SDXL) and "guidance"
        (FLUX.1 dev).
      channels: channels of what is diffused.
      scale: side of an image over the side of what is diffused: 1 for pixels, 8 for the latents of most
        autoencoders.
      low_res: side of the images that it starts from; 0 for a base stage.
      upsampling: how those are brought to the stage's resolution, one of `resizing.UPSAMPLINGS`.
      max_aug_level: in training, the level of noise on the low-resolution image is uniform in
        [0, max_aug_level]; a level is a time of the schedule.
      drop_cond: share of the training examples whose text or class is dropped.
      told_guidance: the guidance scale that a distilled network is told.
    """

    net: Callable[..., jax.Array]
    schedule: Schedule
    prediction: Prediction
    target: Prediction
    weighting: Weighting
    times: TimeSampler
    resolution: int
    inputs: Inputs = dataclasses.field(default_factory=logsnr_input)
    penalty: Penalty = dataclasses.field(default_factory=squared)
    coupling: Coupling = dataclasses.field(default_factory=independent)
    vlb_weight: float = 0.0
    uncertainty: Callable[[Params, jax.Array], jax.Array] | None = None
    conditions: tuple[str, ...] = ("text",)
    channels: int = 3
    scale: int = 1
    low_res: int = 0
    upsampling: str = "bilinear"
    max_aug_level: float = 1.0
    drop_cond: float = 0.1
    told_guidance: float = 3.5

    def shape(self, resolution: int = 0) -> tuple[int, int, int]:
        """The shape of what is diffused, for images of `resolution` pixels; 0: the stage's own."""
        side = (resolution or self.resolution) // self.scale
        return side, side, self.channels


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How a stage is sampled; see `diffjax.diffusion` for what each means.

    Attributes:
      solver: the solver.
      num_steps: its number of steps.
      guidance_scale: how strongly it is guided; 1 is off.
      threshold: keeps the estimates in range.
      aug_level: noise put on the low-resolution image, in [0, 1].
      times: the time grid.
      guidance: how the estimates with and without the condition are combined.
      guidance_interval: the times between which there is guidance.
      two_passes: whether those estimates are made one after the other, which takes less memory, rather than
        as one batch.
    """

    solver: Solver
    num_steps: int
    guidance_scale: float
    threshold: thresholding.Threshold
    aug_level: float = 0.0
    times: TimeGrid = dataclasses.field(default_factory=uniform)
    guidance: Guidance = dataclasses.field(default_factory=classifier_free)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    two_passes: bool = False


def to_model_range(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: jax.Array) -> jax.Array:
    """Floats in [-1, 1] to uint8 pixels; what lies outside is clipped."""
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def with_low_res(
    cond: Cond,
    schedule: Schedule,
    low_res: jax.Array,
    aug_level: jax.Array,
    eps: jax.Array,
    inputs: Inputs | None = None,
) -> Cond:
    """Condition on low-resolution images with noise conditioning augmentation (Ho et al., 2022).

    The network receives the *noised* image and is told how noisy it is.

    Args:
      cond: the other conditions.
      schedule: the schedule whose time `aug_level` is.
      low_res: images in [-1, 1], already upsampled to the stage's resolution, `[batch, h, w, c]`.
      aug_level: `[batch]` in [0, 1].
      eps: standard normal noise of the shape of `low_res`.
      inputs: in which words the network is told the level; None: as log-SNR.
    """
    coeffs = schedule(aug_level)
    told = logsnr(coeffs) if inputs is None else inputs(coeffs, aug_level)[1]
    return cond._replace(low_res=corrupt(schedule, low_res, eps, aug_level), aug_level=told)


def given_cond(stage: Stage, batch: dict[str, jax.Array], count: int, resolution: int) -> Cond:
    """The conditions of a batch, those included that are the same for all of its examples.

    Args:
      stage: the stage.
      batch: `text`, `mask`, `pooled` and `label`, as far as the stage is conditioned on them.
      count: examples in the batch.
      resolution: of the images, in pixels.
    """
    cond = Cond()
    if "text" in stage.conditions:
        cond = cond._replace(
            text=batch["text"].astype(jnp.float32), mask=batch["mask"], pooled=batch["pooled"]
        )
    if "label" in stage.conditions:
        cond = cond._replace(label=batch["label"])
    return with_constants(stage, cond, count, resolution)


def with_constants(stage: Stage, cond: Cond, count: int, resolution: int = 0) -> Cond:
    """`cond` with what a stage is told of every image: its size, uncropped, and the guidance scale."""
    if "size" in stage.conditions:
        side = float(resolution or stage.resolution)
        cond = cond._replace(size=jnp.tile(jnp.array([[side, side, 0.0, 0.0, side, side]]), (count, 1)))
    if "guidance" in stage.conditions:
        cond = cond._replace(guidance=jnp.full((count,), stage.told_guidance))
    return cond


class Examples(NamedTuple):
    """A batch with all that was drawn for it but dropout; every array begins with the axis of examples.

    Attributes:
      x0: the data, `[batch, h, w, channels]`.
      eps: the noise that goes with it, of the same shape.
      t: times, `[batch]`.
      weight: of importance sampling, `[batch]`.
      cond: what the network is told.
    """

    x0: jax.Array
    eps: jax.Array
    t: jax.Array
    weight: jax.Array
    cond: Cond


def draw(
    stage: Stage, batch: dict[str, jax.Array], key: jax.Array, history: LossHistory | None = None
) -> tuple[Examples, jax.Array]:
    """Draw the times, the noises and what else training leaves to chance.

    It is done for a whole batch, whatever parts of it the loss is then computed in: times are stratified over
    the batch, and couplings look at all of it.

    Args:
      stage: the stage.
      batch: `image` uint8 `[batch, h, w, 3]` (the stage's resolution, or a crop), or `latent` float
        `[batch, h / scale, w / scale, channels]`; what the stage is conditioned on: `text`, `mask` and
        `pooled`, or `label`; with `noise` of the shape of what is diffused where pairs are given (reflow).
      key: all randomness of this batch.
      history: where times are drawn by how large their loss was, what it was.

    Returns:
      the examples, and a key for the network's dropout.
    """
    names = ("noise", "time", "drop", "aug", "level", "dropout", "couple")
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}
    x0 = batch["latent"] if "latent" in batch else to_model_range(batch["image"])
    count = x0.shape[0]
    cond = given_cond(stage, batch, count, x0.shape[1] * stage.scale)
    if stage.drop_cond:
        cond = drop_cond(cond, jax.random.bernoulli(keys["drop"], stage.drop_cond, (count,)))
    if stage.low_res:
        factor = stage.resolution // stage.low_res
        level = jax.random.uniform(keys["level"], (count,), maxval=stage.max_aug_level)
        eps = jax.random.normal(keys["aug"], x0.shape)
        low_res = UPSAMPLINGS[stage.upsampling](downsample(x0, factor), factor)
        cond = with_low_res(cond, stage.schedule, low_res, level, eps, stage.inputs)
    noises = batch["noise"] if "noise" in batch else jax.random.normal(keys["noise"], x0.shape)
    x0, noises = stage.coupling(keys["couple"], x0, noises)
    if history is None:
        t, weight = stage.times(keys["time"], count), jnp.ones(count)
    else:
        t, weight = resampling.draw(history, keys["time"], count)
    return Examples(x0, noises, t, weight, cond), keys["dropout"]


def loss(stage: Stage, params: Params, examples: Examples, dropout_key: jax.Array) -> BatchLoss:
    """The training loss of each example; both `examples` and the key are what `draw` gives."""

    def net(x: jax.Array, level: jax.Array) -> jax.Array:
        return stage.net(params, x, level, examples.cond, dropout_key)

    settings: dict[str, Any] = {
        "prediction": stage.prediction,
        "target": stage.target,
        "weighting": stage.weighting,
        "inputs": stage.inputs,
        "penalty": stage.penalty,
        "x0": examples.x0,
        "eps": examples.eps,
        "t": examples.t,
    }
    if stage.vlb_weight:
        losses = hybrid_loss(net, stage.schedule, vlb_weight=stage.vlb_weight, **settings)
    else:
        losses = denoising_loss(net, stage.schedule, **settings)
    level = jnp.clip(logsnr(stage.schedule(examples.t)), -20.0, 20.0)
    objective = examples.weight * losses
    if stage.uncertainty is not None:
        objective = uncertain(objective, stage.uncertainty(params, level))
    return BatchLoss(objective, losses, examples.t, level)


def sample(
    stage: Stage,
    settings: SamplerSettings,
    params: Params,
    cond: Cond,
    keys: jax.Array,
    low_res: jax.Array | None = None,
    guidance_scale: float | jax.Array | None = None,
    null: Cond | None = None,
) -> jax.Array:
    """Sample the stage: one compiled program when jitted with `stage` and `settings` static.

    Args:
      stage: the stage.
      settings: how to sample.
      params: the network's parameters.
      cond: the text conditions.
      keys: a PRNG key for each example, `[batch]`.
      low_res: for a super-resolution stage, images in [-1, 1], `[batch, stage.low_res, stage.low_res, 3]`.
      guidance_scale: in place of that of the settings; as an argument of the program it can change without
        compiling anew.
      null: the null condition of guidance, of the shapes of `cond`, for networks that have none of their own;
        None: `diffjax.nn.conditioning.null_cond`.

    Returns:
      images in [-1, 1], `[batch, resolution, resolution, 3]`, float32; or latents, which may be anything.

    Raises:
      ValueError: the time grid is none, or the prediction is singular at one of its times.
    """
    times = check_grid(
        settings.times(stage.schedule, settings.num_steps), stage.schedule, stage.prediction, settings.solver
    )
    noise_keys, aug_keys = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(2))
    if (low_res is None) == bool(stage.low_res):
        raise ValueError("low_res must be given to a super-resolution stage, and to no other")
    if low_res is not None:
        upsampled = UPSAMPLINGS[stage.upsampling](low_res, stage.resolution // stage.low_res)
        level = jnp.full((keys.shape[0],), settings.aug_level, jnp.float32)
        eps = noise.normal_like(aug_keys, upsampled)
        cond = with_low_res(cond, stage.schedule, upsampled, level, eps, stage.inputs)
    cond = with_constants(stage, cond, keys.shape[0])

    def denoiser_of(cond: Cond) -> Denoiser:
        def net(x: jax.Array, level: jax.Array) -> jax.Array:
            return stage.net(params, x, level, cond)

        return make_denoiser(
            net, stage.schedule, stage.prediction, stage.inputs, learned_variance=stage.vlb_weight > 0.0
        )

    without = null_cond(cond)
    if null is not None:
        without = without._replace(text=null.text, mask=null.mask, pooled=null.pooled)
    pair = (
        guidance.in_turn(denoiser_of(cond), denoiser_of(without))
        if settings.two_passes
        else guidance.one_batch(denoiser_of, cond, without)
    )
    scale = settings.guidance_scale if guidance_scale is None else guidance_scale
    denoise = guidance.guided(pair, settings.guidance, stage.schedule, scale, settings.guidance_interval)
    denoise = thresholding.thresholded(denoise, stage.schedule, settings.threshold)
    images = sampling.sample(
        denoise,
        stage.schedule,
        settings.solver,
        keys=noise_keys,
        shape=stage.shape(),
        times=times,
    )
    return images if stage.scale > 1 else jnp.clip(images, -1.0, 1.0)
