"""Whether a configuration has all its keys, of the right types, and numbers that fit together."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from diffjax.config import cascade_config, is_cascade, nearest, sampler_config, stage_config
from diffjax.errors import UserError

_MAX_INT = 2**53  # no number of a run comes near, and larger ones overflow where they are used


def check_keys(config: ConfigDict) -> None:
    """Refuse a configuration, of a stage or a cascade, that lacks keys, as when a whole group was replaced.

    Raises:
      UserError: a key is missing, or its value is of another type than it should be.
    """
    template = cascade_config() if is_cascade(config) else stage_config()
    stages = config.get("stages")
    for name, stage in stages.items() if isinstance(stages, ConfigDict) else ():
        template.stages[name] = {"workdir": "", "sampler": sampler_config()}
        if isinstance(stage, ConfigDict) and "train" in stage:
            template.stages[name].train = stage_config()
    check_types(config, template)


def check_types(
    config: ConfigDict,
    template: ConfigDict,
    *,
    prefix: str = "",
    missing: Callable[[str], str | None] = "{} is missing, which all configurations have.".format,
    where: str = "",
) -> None:
    """Refuse values that are not of the template's types; further keys may be there.

    Args:
      config: what is looked at.
      template: every key with a value that it could have.
      prefix: what the names of keys begin with.
      missing: from the name of a missing key what is wrong with that, or None: it gets the template's value.
      where: what errors begin with.

    Raises:
      UserError: a value is of another type, or missing.
    """
    usual = template.get("name")
    # Another entry of a table, such as of `ema.name`, takes other keys; a data set's name changes none.
    other = config.get("name", usual) != usual and not prefix.endswith("data.")
    for key, default in template.items():
        name = prefix + key
        if key not in config:
            if other:
                continue
            wrong = missing(name)
            if wrong is not None:
                raise UserError(where + wrong)
            config[key] = default
        value = config[key]
        if not _fits(value, default):
            kind = "group of keys" if isinstance(default, ConfigDict) else type(default).__name__
            raise UserError(f"{where}{name} is {str(value)!r:.80}; expected a {kind}.")
        if isinstance(default, ConfigDict):
            check_types(value, default, prefix=f"{name}.", missing=missing, where=where)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the type of another one: whole numbers are numbers, and tuples have parts."""
    number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT
    if isinstance(default, float):
        return number or isinstance(value, float)
    if type(default) is int:
        return number
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_fits(inner, default[0]) for inner in value if default)
    return default is None or isinstance(value, type(default))


def check_stage(config: ConfigDict) -> None:
    """Refuse a stage whose numbers do not fit together, before anything is compiled."""
    resolution, low_res, crop = config.resolution, config.low_res.resolution, config.crop
    positive: tuple[str, ...] = ("resolution", "steps", "batch_size", "accumulate", "log_every")
    positive += ("checkpoint.every", "checkpoint.keep", "data.resolution", "preview.count")
    positive += ("recovery.max_skips", "recovery.spike_steps")
    for key in positive:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        if value < 1:
            raise UserError(f"{key}={value}; expected at least 1.")
    if config.text.length < (0 if config.text.encoder == "public" else 1):
        raise UserError(f"text.length={config.text.length}; expected at least 1.")
    if low_res and (low_res < 0 or low_res >= resolution or resolution % low_res):
        raise UserError(f"low_res.resolution={low_res} must divide resolution={resolution}, and be smaller.")
    if crop and (not 0 < crop <= resolution or (low_res and crop % (resolution // low_res))):
        raise UserError(
            f"crop={crop} must be at most resolution={resolution}, and a multiple of the upsampling factor."
        )
    if config.data.resolution % resolution:
        raise UserError(
            f"data.resolution={config.data.resolution} must be a multiple of resolution={resolution}."
        )
    for key, value, valid in (
        ("conditions", config.conditions, ("text", "label", "size", "guidance")),
        ("attention", (config.attention,), ("auto", "xla", "cudnn", "flash")),
        ("text.null", (config.text.null,), ("learned", "empty", "zeros")),
        ("data.check", (config.data.check,), ("header", "decode")),
        ("data.animated", (config.data.animated,), ("first", "reject")),
        ("low_res.upsampling", (config.low_res.upsampling,), ("bilinear", "bilinear_corners")),
    ):
        for name in value:
            if name not in valid:
                raise UserError(f"{key}={name!r} does not exist; {nearest(name, valid)}")
    if config.latent.channels and resolution % config.latent.scale:
        raise UserError(f"resolution={resolution} must be a multiple of latent.scale={config.latent.scale}.")
    if config.latent.cache and not config.latent.channels:
        raise UserError("latent.cache needs latents: give latent.channels, or set latent.cache=False.")
    if config.latent.cache and crop:
        raise UserError(
            f"latent.cache holds whole pictures, but crop={crop}; set latent.cache=False or crop=0."
        )
    for group, key in (
        ("preview", "every"),
        ("eval", "every"),
        ("checkpoint", "minutes"),
        ("recovery", "spike"),
        ("recovery", "max_rollbacks"),
        ("recovery", "hang_minutes"),
    ):
        if config[group][key] < 0:
            raise UserError(f"{group}.{key}={config[group][key]}; expected at least 0, which is never.")
    if config.eval.every and "text" in config.conditions and not config.text.cache:
        raise UserError("eval.every needs its captions encoded before: set text.cache=True or eval.every=0.")
    if config.eval.num_images < 2:
        raise UserError(f"eval.num_images={config.eval.num_images}; expected at least 2.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}; expected a whole number from 0 to 2^32 - 1.")
    for key, value in (
        ("text.drop", config.text.drop),
        ("low_res.max_aug_level", config.low_res.max_aug_level),
        ("data.max_rejects", config.data.max_rejects),
    ):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}={value}; expected a number from 0 to 1.")
