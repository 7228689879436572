"""From a configuration to objects: the only file that turns names into functions."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.config import check_stage, nearest
from diffjax.data.emoji import load_emoji
from diffjax.data.folder import load_folder
from diffjax.data.latent_cache import LatentCache, RandomView
from diffjax.data.loader import make_loader
from diffjax.data.source import Source
from diffjax.data.tfds import load_tfds
from diffjax.data.transforms import random_crop, random_flip, resize
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
from diffjax.errors import UserError
from diffjax.interop.pipeline import open_pipeline
from diffjax.interop.text import load_minilm, open_text_encoder
from diffjax.models import dit_sizes, edm2, flux, mmdit, unet, unet2d, unet2d_sizes
from diffjax.models.dit import DiT
from diffjax.nn import kernels, magnitude
from diffjax.nn.conditioning import Cond
from diffjax.nn.layers import axis_rules, logical_axes, unbox
from diffjax.nn.uncertainty import Uncertainty
from diffjax.parallel import hosts
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.stage import SamplerSettings, Stage
from diffjax.text.cache import TextTable, embed_captions
from diffjax.text.encoder import TextEncoder, TextStates
from diffjax.text.live import AddTokens
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
SOURCES: dict[str, Callable[..., Any]] = {"emoji": load_emoji, "folder": load_folder, "tfds": load_tfds}
ENCODERS: dict[str, Callable[[], TextEncoder]] = {"minilm": load_minilm}
UNCERTAINTY = Uncertainty()
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Log = Callable[[str], None]


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry that a configuration names.

    Raises:
      UserError: there is no such entry; the nearest are named.
    """
    if name not in table:
        raise UserError(f"{key}={name!r} does not exist; {nearest(name, table)}")
    return table[name]


def build(table: Mapping[str, Callable[..., Any]], config: ConfigDict, key: str, **fixed: Any) -> Any:
    """Call the function that `config.name` names with the other entries of `config` as arguments.

    Raises:
      UserError: the name or an argument does not exist, or the function refuses a value.
    """
    values = {name: value for name, value in config.items() if name != "name"}
    function = choose(table, config.name, f"{key}.name")
    valid = [
        name for name in inspect.signature(function).parameters if name not in ("name", "parent", *fixed)
    ]
    for name in values:
        if name not in valid:
            advice = nearest(name, valid) if valid else "it has no settings."
            raise UserError(f"{key}.{name} is no setting of {config.name!r}; {advice}")
    try:
        return function(**values, **fixed)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{key}: {error}") from error


def without_foreign(table: Mapping[str, Callable[..., Any]], config: ConfigDict) -> ConfigDict:
    """`config` without the settings that belong to other entries of the table than the one it names.

    On the command line a name can be changed, but no setting removed: `threshold.name=static` must not
    stumble over the percentile of the dynamic one.
    """
    own = inspect.signature(table[config.name]).parameters if config.name in table else {}
    foreign = {name for function in table.values() for name in inspect.signature(function).parameters} - set(
        own
    )
    return ConfigDict({name: value for name, value in config.items() if name not in foreign})


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


@contextlib.contextmanager
def on_mesh(mesh: Mesh, attention: str = "auto") -> Iterator[None]:
    """Within it, programs are compiled for a mesh, its rules for activations, and a kernel for attention.

    Args:
      mesh: the mesh.
      attention: one of `diffjax.nn.kernels.KERNELS`, or "auto".

    Raises:
      UserError: there is no such kernel.
    """
    with jax.set_mesh(mesh), axis_rules(Rules().pairs()), kernels.use_kernel(attention):
        yield


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
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {error}") from error
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
        raise UserError(f"{key}: {error}") from error


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
        raise UserError(f"optimizer: {error}") from error
    make = choose(OPTIMIZERS, settings.name, "optimizer.name")
    names = ("b1", "b2", "weight_decay", "clip_norm", "moments")
    try:
        return make(learning_rate, **{name: settings[name] for name in names}), learning_rate
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


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


def build_source(data: ConfigDict, *, log: Log | None = None, split: str | None = None) -> Source:
    """Open the pictures that `data` describes, or another split of the same."""
    load = choose(SOURCES, data.source, "data.source")
    split = split or data.split
    settings = {
        "num_concepts": data.num_concepts if split == data.split and data.num_concepts else None,
        "folder": data.folder,
        "dataset": data.name,
        "data_dir": data.folder or None,
    }
    asked = {key: settings[key] for key in inspect.signature(load).parameters if key in settings}
    for key, name in (("folder", "data.folder"), ("dataset", "data.name")):
        if key in asked and not asked[key]:
            raise UserError(f"data.source={data.source!r} needs {name}: give --config.{name}=….")
    cache_dir = Path(data.cache_dir).expanduser()
    with hosts.first_alone(f"pictures of {split}"):  # it may write the cache that the others then find
        return load(cache_dir, resolution=data.resolution, split=split, log=log, **asked)


def check_classes(config: ConfigDict, source: Source) -> None:
    """Refuse data whose classes the network of a stage cannot be told.

    Raises:
      UserError: the data has no classes, or more than the network.
    """
    if "label" not in config.conditions:
        return
    if not len(source.labels):
        raise UserError(f"conditions={config.conditions} asks for classes, but {source.name} has none.")
    known = getattr(build_model(config), "classes", 0)
    if len(source.classes) > known:
        raise UserError(
            f"model.classes={known}, but {source.name} has {len(source.classes)} classes; the network "
            "needs as many at least."
        )


def build_encoder(config: ConfigDict, mesh: Mesh | None = None) -> TextEncoder | None:
    """Load the frozen text encoder of a stage; None if it is not conditioned on text.

    Args:
      config: the stage's configuration.
      mesh: over which the parameters of a public encoder are divided.
    """
    if "text" not in config.conditions:
        return None
    text = config.text
    if text.encoder == "public":
        encoder: Any = _public_encoder(config, mesh)
    else:
        encoder = choose(ENCODERS, text.encoder, "text.encoder")()
    if text.length > encoder.max_length:
        raise UserError(
            f"text.length={text.length}, but {text.encoder} reads at most {encoder.max_length} tokens."
        )
    return encoder


def _public_encoder(config: ConfigDict, mesh: Mesh | None) -> Any:
    if not config.text.folder:
        raise UserError(
            "text.encoder='public' needs a folder: give --config.text.folder=FOLDER, a checkpoint of "
            "diffusers with its text encoders."
        )
    folder = Path(config.text.folder).expanduser()
    kind = open_pipeline(folder).kind.name

    def place(shapes: Any, axes: Any) -> Any:
        return None if mesh is None else param_shardings(mesh, Rules(), shapes, axes)

    names = {"sd": "sd15", "if_super_resolution": "if"}
    dtype = choose(DTYPES, config.dtype, "dtype")
    return open_text_encoder(folder, names.get(kind, kind), dtype=dtype, place=place if mesh else None)


def with_text_length(config: ConfigDict, encoder: TextEncoder | None) -> ConfigDict:
    """The configuration with the number of tokens that a public encoder's pipeline uses, where it is 0."""
    if encoder is None or config.text.length:
        return config
    config = config.copy_and_resolve_references()
    config.text.length = getattr(encoder, "length", encoder.max_length)
    return config


def build_text_table(
    config: ConfigDict, encoder: TextEncoder | None, captions: Sequence[str], *, log: Log | None = None
) -> TextTable | None:
    """Encode captions, or find them in the cache; with the empty one, where it stands for no text."""
    if encoder is None:
        return None
    if config.text.null != "learned":
        captions = [*captions, ""]
    cache_dir = Path(config.data.cache_dir).expanduser() / "text"
    # Encoders may lie on the devices of all processes, who then must encode the same captions together.
    return embed_captions(
        encoder,
        captions,
        length=config.text.length,
        cache_dir=cache_dir,
        log=log,
        write=hosts.is_first(),
        agree=hosts.anywhere,
    )


def text_widths(text: TextTable | None) -> dict[str, int]:
    """The widths of encoded captions, as `build_stage` asks for them."""
    return {} if text is None else {"text_embed": text.embed, "pooled_embed": text.pooled_embed}


@dataclasses.dataclass(frozen=True)
class AddText:
    """A transform that adds a picture's encoded caption; with chance `drop`, the empty one's or zeros.

    It has the method of grain's `RandomMap`: which captions are dropped depends on the seed and the element's
    place in the order alone.
    """

    captions: Sequence[str]
    table: TextTable
    drop: float = 0.0
    zeros: bool = False

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Add `text`, `mask` and `pooled` to an element with its `index`."""
        dropped = self.drop > 0.0 and rng.random() < self.drop
        text = self.table.lookup("" if dropped else self.captions[int(element["index"])])
        if dropped and self.zeros:
            text = text._replace(states=np.zeros_like(text.states), pooled=np.zeros_like(text.pooled))
        return {**element, "text": text.states, "mask": text.mask, "pooled": text.pooled}


def build_loader(
    config: ConfigDict,
    source: Source,
    table: TextTable | None,
    latents: LatentCache | None = None,
    *,
    live: TextEncoder | None = None,
    rows: Sequence[int] | None = None,
) -> Any:
    """An iterator of batches, or of some `rows` of each: `image`, `index`, and the stage's conditions.

    With the cached `latents` of the source, there are `moments` `[batch, 2, h, w, c]` in place of `image`;
    all else is the same, the order and which captions are dropped included. Where a `live` encoder is to
    encode captions, not the `table`, there are their tokens, which `diffjax.text.live.add_states` replaces.
    """
    transforms: list[Any] = [resize(source.resolution, config.resolution) if latents is None else latents.add]
    if config.crop:
        transforms.append(random_crop(config.crop))
    if config.data.flip:
        transforms.append(random_flip() if latents is None else RandomView())
    drop = 0.0 if config.text.null == "learned" else config.text.drop
    zeros = config.text.null == "zeros"
    if live is not None:
        transforms.append(AddTokens(source.captions, live, config.text.length, drop, zeros=zeros))
    elif table is not None:
        transforms.append(AddText(source.captions, table, drop, zeros=zeros))
    if "label" in config.conditions:
        transforms.append(
            lambda element: {**element, "label": np.int32(source.labels[int(element["index"])])}
        )
    return make_loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        rows=rows,
        transforms=transforms,
        images=latents is None,
        num_threads=config.data.num_threads,
    )


def null_zeros(cond: Cond) -> Cond:
    """The null condition of networks that were trained with zeros in the place of no text (SDXL)."""
    return cond._replace(text=np.zeros_like(cond.text), pooled=np.zeros_like(cond.pooled))


def to_cond(
    text: TextTable | TextStates | None, captions: Sequence[str] = (), labels: Sequence[int] = ()
) -> Cond:
    """The conditions of examples.

    Args:
      text: their encoded captions, or a table in which `captions` are found; None: they have none.
      captions: as many as there are examples.
      labels: their classes; none if the stage knows no classes.
    """
    cond = Cond(label=np.asarray(labels, np.int32) if len(labels) else None)
    if text is None:
        return cond
    rows = text.rows(captions) if isinstance(text, TextTable) else text
    return cond._replace(text=np.asarray(rows.states, np.float32), mask=rows.mask, pooled=rows.pooled)
