"""A cascade of trained stages: opened from their working directories, and sampled one after the other."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax import run_config
from diffjax import stage as stages
from diffjax.errors import UserError
from diffjax.experiment import (
    build_encoder,
    build_sampler,
    build_stage,
    check_sampler,
    null_zeros,
    to_cond,
    with_text_length,
)
from diffjax.latents import Codec, open_codec
from diffjax.nn.conditioning import Cond
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.parallel.rules import Rules, on_mesh, param_shardings
from diffjax.pretrained import adopt, adopt_sampler, read_params
from diffjax.stage import SamplerSettings, Stage
from diffjax.text.encoder import TextEncoder
from diffjax.training.checkpoint import FOLDER, Checkpoints

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A stage with its averaged parameters, and how it is sampled; latents are decoded by `codec`."""

    name: str
    config: ConfigDict
    stage: Stage
    settings: SamplerSettings
    params: Any
    step: int
    codec: Codec | None = None


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Stages in the order of sampling, the text encoder that they share, if any, and where they run."""

    stages: tuple[TrainedStage, ...]
    encoder: TextEncoder | None
    text_length: int
    mesh: Mesh
    attention: str = "auto"


def stage_workdir(config: ConfigDict, name: str, workdir: Path) -> Path:
    """Where a stage was, or will be, trained."""
    entry = config.stages[name]
    path = Path(entry.workdir).expanduser()
    return workdir / path if "train" in entry else path


def open_cascade(config: ConfigDict, workdir: Path) -> Cascade:
    """Load the stages that a cascade's configuration names.

    Raises:
      UserError: a stage has no checkpoint, or the stages do not fit together.
    """
    if not config.stages:
        raise UserError("the configuration names no stages.")
    mesh = make_mesh(**config.mesh)
    # A stage of public weights that is given no folder is left out, unless that leaves none.
    given = [
        name for name, entry in config.stages.items() if entry.get("public", {"init_from": "-"})["init_from"]
    ]
    names = given or list(config.stages)
    trained = {name: _stage_config(config, name, workdir) for name in names}
    order = _chain({name: (c.resolution, c.low_res.resolution) for name, c in trained.items()})
    texts = {name: (trained[name].text.encoder, trained[name].text.length) for name in order}
    if len(set(texts.values())) > 1:
        raise UserError(f"the stages were trained with different text encoders or lengths: {texts}.")
    encoder = build_encoder(trained[order[0]], mesh)
    trained = {name: with_text_length(stage, encoder) for name, stage in trained.items()}
    first = trained[order[0]]
    widths = {}
    if encoder is not None:
        example = encoder.encode([""], length=first.text.length)
        widths = {"text_embed": example.states.shape[-1], "pooled_embed": example.pooled.shape[-1]}
    loaded = []
    for name in order:
        key = f"stages.{name}.sampler"
        settings = build_sampler(adopt_sampler(config.stages[name].sampler, trained[name]), key)
        folder = stage_workdir(config, name, workdir) if config.stages[name].workdir else None
        loaded.append(_load(name, trained[name], settings, folder, widths, mesh))
    return Cascade(tuple(loaded), encoder, first.text.length, mesh, config.attention)


def _load(
    name: str,
    config: ConfigDict,
    settings: SamplerSettings,
    folder: Path | None,
    widths: dict[str, int],
    mesh: Mesh,
) -> TrainedStage:
    """Build a stage and read its parameters: the averaged ones of a run, or without `folder` public ones."""
    if folder is not None and not (folder / FOLDER).is_dir():
        raise UserError(f"stage {name!r}: there is no checkpoint in {folder}; train it first.")
    model = build_stage(config, **widths)
    check_sampler(model.stage, settings, f"stages.{name}.sampler")
    places = param_shardings(mesh, Rules(), model.shapes, model.axes)
    if folder is None:
        params, step = read_params(config, model, places), 0
    else:
        params, step = _restore(name, folder, model.shapes, places)
    return TrainedStage(
        name, config, model.stage, settings, params, step, open_codec(config, model.stage, mesh)
    )


def _restore(name: str, folder: Path, shapes: Any, places: Any) -> tuple[Any, int]:
    """The averaged parameters of a run's last checkpoint, and its step."""
    abstract = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places
    )
    checkpoints = Checkpoints(folder)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"stage {name!r}: there is no checkpoint in {folder}; train it first.")
        return checkpoints.restore_ema(abstract), step
    finally:
        checkpoints.close()


def _stage_config(config: ConfigDict, name: str, workdir: Path) -> ConfigDict:
    """The configuration that a stage was trained with, or that a public checkpoint stands for."""
    if config.stages[name].workdir:
        return run_config.load(stage_workdir(config, name, workdir))
    public = configs.stage_config()
    public.update(config.stages[name].get("public", ConfigDict()))
    return adopt(public)


def _chain(resolutions: dict[str, tuple[int, int]]) -> list[str]:
    """Order stages by (resolution, low_res): each must start where the one before it ended."""
    order = sorted(resolutions, key=lambda name: resolutions[name])
    expected = 0
    for name in order:
        resolution, low_res = resolutions[name]
        if low_res != expected:
            have = "no stage" if expected == 0 else f"a stage of {expected} px"
            need = "is a base stage" if low_res == 0 else f"starts from {low_res} px"
            raise UserError(f"stage {name!r} ({resolution} px) {need}, but {have} comes before it.")
        expected = resolution
    return order


def image_keys(seed: int, prompts: Sequence[str], numbers: Sequence[int]) -> jax.Array:
    """A PRNG key for each image, from the seed, its prompt and its number among those of the same prompt.

    What else is sampled, in what order and in which batch does not change an image.
    """
    base = jax.random.key(seed)
    # 31 bits, because fold_in takes what fits an int32 on every platform.
    prompt_codes = np.asarray([zlib.crc32(p.encode("utf-8", "replace")) & 0x7FFFFFFF for p in prompts])

    def key(code: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(base, code), number)

    return jax.vmap(key)(prompt_codes, np.asarray(numbers))


def encode_prompts(cascade: Cascade, prompts: Sequence[str], log: Log) -> Cond:
    """Encode prompts; those that are longer than the stages' text length are cut, and said so.

    Of stages that know classes, a prompt is the number or the name of one.
    """
    if cascade.encoder is None:
        first = cascade.stages[0]
        labelled = "label" in first.stage.conditions
        return to_cond(None, labels=_labels(prompts, first.config.class_names) if labelled else ())
    for i in cascade.encoder.truncated(prompts, cascade.text_length):
        log(f"prompt {i + 1} is longer than {cascade.text_length} tokens; its end is ignored.")
    text = cascade.encoder.encode(prompts, length=cascade.text_length)
    return to_cond(text)


def _labels(prompts: Sequence[str], names: Sequence[str]) -> list[int]:
    """The classes that prompts name: by number, or by one of the names that a class has."""
    known = {part.strip().lower(): i for i, name in enumerate(names) for part in (name, *name.split(","))}
    labels = []
    for prompt in prompts:
        label = int(prompt) if prompt.isdecimal() else known.get(prompt.lower())
        if label is None or (names and label >= len(names)):
            expected = f"a number below {len(names)}, or a name" if names else "a number"
            advice = configs.nearest(prompt.lower(), known) if names else ""
            raise UserError(f"prompt {prompt!r} is no class; expected {expected}. {advice}".strip())
        labels.append(label)
    return labels


def generate(
    cascade: Cascade, cond: Cond, keys: jax.Array, *, batch_size: int, low_res: np.ndarray | None = None
) -> list[np.ndarray]:
    """Sample every stage.

    Args:
      cascade: the cascade.
      cond: text conditions, `[n, …]`.
      keys: a key for each image, `[n]`.
      batch_size: images at a time, over all devices.
      low_res: uint8 images that the first stage starts from, if it is one of super-resolution.

    Returns:
      for each stage, its images: uint8 `[n, resolution, resolution, 3]`, all of them in every process.
    """
    count = keys.shape[0]
    results: list[list[np.ndarray]] = [[] for _ in cascade.stages]
    runs = [functools.partial(sampler(item.stage, item.settings), item.params) for item in cascade.stages]
    nulls = _nulls(cascade, batch_size)
    for start in range(0, count, batch_size):
        # The last batch is filled up with copies, so that all batches run the same program.
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        wanted = min(batch_size, count - start)
        place = batch_sharding(cascade.mesh)
        batch = hosts.spread(jax.tree.map(lambda leaf, rows=rows: leaf[rows], cond), place)
        images = None
        if low_res is not None:
            images = hosts.spread(np.asarray(stages.to_model_range(low_res[rows])), place)
        for number, run in enumerate(runs):
            stage_keys = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(keys[rows])
            with on_mesh(cascade.mesh, cascade.attention):
                images = run(batch, hosts.spread(stage_keys, place), images, null=nulls[number])
                codec = cascade.stages[number].codec
                images = images if codec is None else codec.decode(images)
            results[number].append(hosts.gather(stages.to_pixels(images))[:wanted])
    return [np.concatenate(parts) for parts in results]


def _nulls(cascade: Cascade, batch_size: int) -> list[Cond | None]:
    """For each stage the null condition of a batch; None for those that have learnt their own."""
    if cascade.encoder is None or all(item.config.text.null == "learned" for item in cascade.stages):
        return [None] * len(cascade.stages)
    cond = encode_prompts(cascade, [""], lambda line: None)
    rows = jax.tree.map(lambda leaf: np.repeat(leaf, batch_size, axis=0), cond)
    nulls: dict[str, Cond | None] = {"learned": None}
    for name, null in {"empty": rows, "zeros": null_zeros(rows)}.items():
        nulls[name] = hosts.spread(null, batch_sharding(cascade.mesh))
    return [nulls[item.config.text.null] for item in cascade.stages]


def sampler(stage: Stage, settings: SamplerSettings) -> Any:
    """The jitted sampler of a stage, `(params, cond, keys, low_res) -> images`.

    Compiled once per process and batch shape: another seed, prompt or guidance scale runs the same program.
    """
    scale = settings.guidance_scale
    if scale == settings.guidance.off_at:
        return _compiled(stage, settings)
    # The scale is an argument of the program, not a part of it.
    program = _compiled(stage, dataclasses.replace(settings, guidance_scale=0.0))
    return functools.partial(program, guidance_scale=jnp.float32(scale))


@functools.lru_cache(maxsize=16)
def _compiled(stage: Stage, settings: SamplerSettings) -> Any:
    return jax.jit(functools.partial(stages.sample, stage, settings))
