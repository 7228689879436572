"""Public checkpoints as the start of a stage: what they fix of its configuration, and their parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.experiment import MODELS, StageModel
from diffjax.interop.denoisers import FAMILIES
from diffjax.interop.model import Network, open_network
from diffjax.interop.pipeline import Pipeline, open_pipeline

# Attributes of a network that the rest of the configuration decides, and those that the user may choose.
_DECIDED = ("dtype", "out_channels", "time_input", "name", "parent")
_FREE = ("remat", "scan", "dropout")


def adopt(config: ConfigDict) -> ConfigDict:
    """A stage's configuration with what the checkpoint that `init_from` names fixes of it.

    That is: the network and what it is told, the noise schedule, the prediction, the autoencoder, the text
    encoders and, where it is 0, the resolution.

    Raises:
      UserError: the folder cannot be read, or is of no kind that is known.
    """
    if not config.init_from:
        if config.model.name == "public":
            raise UserError("this configuration starts from public weights: give --config.init_from=FOLDER.")
        return config
    pipeline = _pipeline(config)
    network = _network(pipeline)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        _adopt_network(config, network)
        _adopt_process(config, pipeline)
        _adopt_conditions(config, pipeline)
    return config


def adopt_sampler(settings: ConfigDict, config: ConfigDict) -> ConfigDict:
    """A sampler's configuration in which what is named "public" is the checkpoint's own.

    Args:
      settings: see `diffjax.config.public_sampler`.
      config: of the stage, which `adopt` has returned.
    """
    public = [key for key in ("solver", "times", "threshold") if settings[key].name == "public"]
    if not public:
        return settings
    if not config.init_from:
        raise UserError(
            f"a sampler's {public[0]} is 'public', but the stage comes from no public checkpoint."
        )
    own = _pipeline(config).sampler(settings.num_steps, resolution=config.resolution)
    settings = settings.copy_and_resolve_references()
    with settings.unlocked():
        for key in public:
            settings[key] = ConfigDict(getattr(own, key))
        settings.num_steps = own.num_steps
    return settings


def read_params(config: ConfigDict, model: StageModel, places: Any) -> Any:
    """The parameters of the checkpoint that a stage starts from, placed as `places` says.

    Raises:
      UserError: they are not those of the stage's network.
    """
    network = _network(_pipeline(config))
    within = config.diffusion.uncertainty
    shapes, targets = (tree["net"] if within else tree for tree in (model.shapes, places))
    ours, theirs = flatten_dict(shapes, sep="/"), flatten_dict(network.shapes, sep="/")
    differing = sorted(
        path
        for path in ours.keys() | theirs.keys()
        if path not in ours or path not in theirs or ours[path].shape != theirs[path].shape
    )
    if differing:
        raise UserError(
            f"the network of {config.init_from} is not the one that `model` describes; {len(differing)} "
            f"parameters differ, such as {', '.join(differing[:5])}."
        )
    params = network.read(shardings=targets)
    if not within:
        return params
    return {
        "net": params,
        "uncertainty": jax.jit(lambda key: model.init(key)["uncertainty"])(jax.random.key(0)),
    }


def _pipeline(config: ConfigDict) -> Pipeline:
    return open_pipeline(Path(config.init_from).expanduser())


def _network(pipeline: Pipeline) -> Network:
    return open_network(pipeline.component(pipeline.denoiser), FAMILIES)


def _adopt_network(config: ConfigDict, network: Network) -> None:
    name = next((name for name, model in MODELS.items() if isinstance(network.module, model)), "")
    if not name:
        raise UserError(
            f"{network.folder}: a {network.family.name} is none of the models, {', '.join(MODELS)}."
        )
    values = {
        field.name: getattr(network.module, field.name)
        for field in dataclasses.fields(network.module)
        if field.name not in _DECIDED
    }
    chosen = {key: config.model[key] for key in _FREE if key in config.model and key in values}
    config.model = ConfigDict({"name": name, **values, **chosen})


def _adopt_process(config: ConfigDict, pipeline: Pipeline) -> None:
    process = pipeline.process
    if process is None:
        raise UserError(
            f"{pipeline.folder}: has no scheduler, which says what its network was trained with; expected "
            "the folder of a whole pipeline."
        )
    diffusion = config.diffusion
    diffusion.schedule, diffusion.inputs = ConfigDict(process.schedule), ConfigDict(process.inputs)
    diffusion.prediction = ConfigDict(process.prediction)
    diffusion.target = ConfigDict(process.prediction)
    if pipeline.learned_variance:
        diffusion.vlb_weight = diffusion.vlb_weight or 0.001  # as it was trained
    else:
        diffusion.vlb_weight = 0.0


def _adopt_conditions(config: ConfigDict, pipeline: Pipeline) -> None:
    kind = pipeline.kind
    config.init_from = str(pipeline.folder.resolve())
    config.resolution = config.resolution or pipeline.resolution
    config.data.resolution = config.data.resolution or config.resolution
    config.latent.channels = pipeline.channels if kind.latent else 0
    if kind.latent:
        config.latent.scale, config.latent.folder = pipeline.scale, str(pipeline.component("vae").resolve())
    if kind.text_length:
        config.text.encoder, config.text.folder = "public", config.init_from
        config.text.length = 0  # what the pipeline gives its encoder
        config.text.null = "zeros" if pipeline.zero_null_text else "empty"
        further = {"sdxl": ("size",), "flux": ("guidance",) if pipeline.guidance_embedded else ()}
        config.conditions = ("text", *further.get(kind.name, ()))
    else:
        config.conditions, config.class_names = ("label",), pipeline.labels
    if kind.name == "if_super_resolution":
        noise = pipeline.image_noise
        if noise is not None and ConfigDict(noise.schedule) != config.diffusion.schedule:
            raise UserError(
                f"{pipeline.folder}: its image_noising_scheduler has other noise levels than its scheduler, "
                "which is not supported."
            )
        config.low_res.resolution = config.low_res.resolution or config.resolution // 4
        config.low_res.upsampling = "bilinear_corners"
