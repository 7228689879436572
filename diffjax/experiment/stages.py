"""A stage and its training, from a configuration."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.check_config import check_stage
from diffjax.diffusion import (
    couplings,
    grids,
    guidance_rules,
    inputs,
    losses,
    predictions,
    resampling,
    schedules,
    solvers,
    thresholding,
    timesteps,
    weightings,
)
from diffjax.diffusion.resampling import LossHistory
from diffjax.errors import UserError, brief
from diffjax.experiment.tables import DTYPES, build, choose, without_foreign
from diffjax.models import dit_sizes, edm2, flux, mmdit, unet, unet2d, unet2d_sizes
from diffjax.models.dit import DiT
from diffjax.nn import magnitude
from diffjax.nn.conditioning import Cond
from diffjax.nn.placement import logical_axes, unbox
from diffjax.nn.uncertainty import Uncertainty
from diffjax.stage import SamplerSettings, Stage
from diffjax.training import ema
from diffjax.training.optimizer import OPTIMIZERS, learning_rate_schedule
from diffjax.training.step import make_train_step

MODELS = {
    "dit": DiT,
    "unet": unet.UNet,
    "unet2d": unet2d.UNet2D,
    "edm2": edm2.EDM2UNet,
    "mmdit": mmdit.MMDiT,
    "flux": flux.Flux,
}
SIZES: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "dit": dit_sizes.SIZES,
    "unet": unet.SIZES,
    "unet2d": unet2d_sizes.SIZES,
    "edm2": edm2.SIZES,
    "mmdit": mmdit.SIZES,
    "flux": flux.SIZES,
}
UNCERTAINTY = Uncertainty()


@dataclasses.dataclass(frozen=True)
class StageModel:
    """A stage, and how its parameters come to be.

    Attributes:
      stage: the stage.
      init: `key -> parameters`, without axis names.
      axes: the logical axis names of the parameters.
      shapes: their shapes, as `jax.ShapeDtypeStruct`.
      history: where times are drawn by their losses, the history that training starts with.
    """

    stage: Stage
    init: Callable[[jax.Array], Any]
    axes: Any
    shapes: Any
    history: LossHistory | None = None


def build_model(config: ConfigDict) -> Any:
    """The network of a stage, with the attributes that follow from the rest of the configuration.

    `model.size` is a published size of `SIZES`, from which the other entries of `model` may differ.
    """
    dtype = choose(DTYPES, config.dtype, "dtype")
    channels = config.latent.channels or 3
    fixed = {"dtype": dtype, "out_channels": 2 * channels if config.diffusion.vlb_weight else channels}
    model = choose(MODELS, config.model.name, "model.name")
    if "time_input" in inspect.signature(model).parameters:
        fixed["time_input"] = config.diffusion.inputs.name
    own = {key: value for key, value in config.model.items() if key != "size"}
    size = config.model.get("size", "")
    if size:
        own = {**choose(SIZES[config.model.name], size, "model.size"), **own}
    own = {key: value for key, value in own.items() if key not in fixed}
    return build(MODELS, ConfigDict(own), "model", **fixed)


def build_stage(config: ConfigDict, *, text_embed: int = 0, pooled_embed: int = 0) -> StageModel:
    """Build a stage from its configuration; nothing is compiled.

    Args:
      config: a stage's configuration.
      text_embed: width of the text encoder's token states.
      pooled_embed: width of its pooled vector; 0: the same.
    """
    check_stage(config)
    diffusion = config.diffusion
    model = build_model(config)

    def entry(table: Mapping[str, Callable[..., Any]], key: str) -> Any:
        return build(table, without_foreign(table, diffusion[key]), f"diffusion.{key}")

    prediction, target = (entry(predictions.PREDICTIONS, key) for key in ("prediction", "target"))
    stage = Stage(
        net=_bind(model, within="net" if diffusion.uncertainty else ""),
        schedule=entry(schedules.SCHEDULES, "schedule"),
        prediction=prediction,
        # The same object, so that the loss knows.
        target=prediction if diffusion.target == diffusion.prediction else target,
        weighting=entry(weightings.WEIGHTINGS, "weighting"),
        times=entry(timesteps.TIMESTEPS, "times"),
        inputs=entry(inputs.INPUTS, "inputs"),
        penalty=entry(losses.PENALTIES, "penalty"),
        coupling=entry(couplings.COUPLINGS, "coupling"),
        vlb_weight=float(diffusion.vlb_weight),
        uncertainty=_bind_uncertainty if diffusion.uncertainty else None,
        resolution=config.resolution,
        conditions=tuple(config.conditions),
        channels=config.latent.channels or 3,
        scale=config.latent.scale if config.latent.channels else 1,
        low_res=config.low_res.resolution,
        upsampling=config.low_res.upsampling,
        max_aug_level=config.low_res.max_aug_level,
        # The loader drops captions whose place the empty one takes.
        drop_cond=config.text.drop if config.text.null == "learned" else 0.0,
        told_guidance=config.told_guidance,
    )
    examples = example_inputs(config, stage, text_embed, pooled_embed or text_embed)

    def init(key: jax.Array) -> Any:
        params = model.init(key, *examples)["params"]
        if diffusion.uncertainty:
            return {"net": params, "uncertainty": UNCERTAINTY.init(key, examples[1])["params"]}
        return params

    try:
        boxed = jax.eval_shape(init, jax.random.key(0))
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:  # such as of a size that is 0
        raise UserError(f"model: {brief(error)}") from error
    history = resampling.init() if diffusion.resample else None
    return StageModel(stage, lambda key: unbox(init(key)), logical_axes(boxed), unbox(boxed), history)


def _bind_uncertainty(params: Any, logsnr: jax.Array) -> Any:
    return UNCERTAINTY.apply({"params": params["uncertainty"]}, logsnr)


def _bind(model: Any, *, within: str) -> Callable[..., jax.Array]:
    def net(
        params: Any, x: jax.Array, logsnr: jax.Array, cond: Cond, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        params = params[within] if within else params
        if dropout_key is None or not getattr(model, "dropout", 0.0):
            return model.apply({"params": params}, x, logsnr, cond)
        rngs = {"dropout": dropout_key}
        return model.apply({"params": params}, x, logsnr, cond, deterministic=False, rngs=rngs)

    return net


def example_inputs(
    config: ConfigDict, stage: Stage, text_embed: int, pooled_embed: int
) -> tuple[jax.Array, jax.Array, Cond]:
    """Zeros of the shapes that a stage's network is given: one image, a noise level and the conditions."""
    size = config.crop or config.resolution
    image = jnp.zeros((1, *stage.shape(size)))
    text = jnp.zeros((1, config.text.length, text_embed))
    batch = {"text": text, "mask": jnp.ones(text.shape[:2], bool), "pooled": jnp.zeros((1, pooled_embed))}
    cond = stages.given_cond(stage, {**batch, "label": jnp.zeros(1, jnp.int32)}, 1, size)
    if config.low_res.resolution:
        cond = cond._replace(low_res=image, aug_level=jnp.zeros(1))
    return image, jnp.zeros(1), cond


def build_sampler(config: ConfigDict, key: str) -> SamplerSettings:
    """Build the settings of a sampler; `key` is where they stand, for errors."""
    if config.num_steps < 1:
        raise UserError(f"{key}.num_steps={config.num_steps}; expected at least 1.")
    if not 0.0 <= config.aug_level <= 1.0:
        raise UserError(f"{key}.aug_level={config.aug_level}; expected a number from 0 to 1.")
    low, high = config.guidance_interval
    if not 0.0 <= low < high <= 1.0:
        raise UserError(f"{key}.guidance_interval={(low, high)}; expected two rising numbers from 0 to 1.")

    def entry(table: Mapping[str, Callable[..., Any]], name: str) -> Any:
        return build(table, without_foreign(table, config[name]), f"{key}.{name}")

    return SamplerSettings(
        solver=entry(solvers.SOLVERS, "solver"),
        num_steps=config.num_steps,
        guidance_scale=float(config.guidance_scale),
        threshold=entry(thresholding.THRESHOLDS, "threshold"),
        aug_level=float(config.aug_level),
        times=entry(grids.TIME_GRIDS, "times"),
        guidance=entry(guidance_rules.GUIDANCES, "guidance"),
        guidance_interval=(float(low), float(high)),
        two_passes=config.two_passes,
    )


def check_sampler(stage: Stage, settings: SamplerSettings, key: str) -> None:
    """Refuse a sampler that the stage's process does not allow, before anything is compiled."""
    try:
        times = settings.times(stage.schedule, settings.num_steps)
        grids.check_grid(times, stage.schedule, stage.prediction, settings.solver)
    except ValueError as error:
        raise UserError(f"{key}: {brief(error)}") from error


def build_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its learning rate at each step."""
    settings = config.optimizer
    try:
        learning_rate = learning_rate_schedule(
            peak=settings.learning_rate,
            steps=config.steps,
            warmup_steps=settings.warmup_steps,
            decay=settings.decay,
            decay_from=settings.decay_from,
        )
    except ValueError as error:
        raise UserError(f"optimizer: {brief(error)}") from error
    make = choose(OPTIMIZERS, settings.name, "optimizer.name")
    names = ("b1", "b2", "weight_decay", "clip_norm", "moments")
    try:
        return make(learning_rate, **{name: settings[name] for name in names}), learning_rate
    except ValueError as error:
        raise UserError(f"optimizer: {brief(error)}") from error


def build_update(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    decay: ema.Decay,
    *,
    accumulate: int = 1,
) -> Any:
    """The update of a stage, not yet compiled: `(state, batch, key) -> (state, metrics)`."""
    return make_train_step(
        functools.partial(stages.draw, stage),
        functools.partial(stages.loss, stage),
        optimizer,
        decay=decay,
        learning_rate=learning_rate,
        project=magnitude.normalised,
        accumulate=accumulate,
    )


def build_ema(config: ConfigDict) -> ema.Decay:
    """How the moving average of the parameters forgets."""
    return build(ema.DECAYS, without_foreign(ema.DECAYS, config.ema), "ema")
