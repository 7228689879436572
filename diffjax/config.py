"""Configurations: every key with its default.

A config file returns `stage_config()` (one network to train) or `cascade_config()` (stages to sample from)
with other values. The defaults are locked and typed: a key or a type that does not exist here is an error.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict


def stage_config() -> ConfigDict:
    """One stage: a network, what it is trained on, and how."""
    config = ConfigDict()
    config.seed = 0
    # A folder of diffusers whose network, process, autoencoder and text encoders are taken over; "": none.
    config.init_from = ""
    config.resolution = 64  # of the images that this stage makes, in pixels
    config.crop = 0  # train on random crops of this size; 0: on whole images
    # resolution 0: a base stage
    config.low_res = ConfigDict({"resolution": 0, "max_aug_level": 1.0, "upsampling": "bilinear"})
    # channels 0: pixels; folder: of the autoencoder, as diffusers writes it; cache: encode every picture once
    # before training, into data.cache_dir, instead of at every step
    config.latent = ConfigDict({"channels": 0, "scale": 8, "folder": "", "cache": False})
    # What the network is told: of "text", "label", "size" (SDXL), "guidance" (FLUX.1 dev).
    config.conditions = ("text",)
    config.class_names = ()  # of labels, so that prompts can name them; () those of the data
    config.told_guidance = 3.5  # to a network that is told the guidance scale
    config.steps = 100_000
    config.batch_size = 64  # over all devices
    config.accumulate = (
        1  # parts of the batch whose gradients are computed one after the other, to save memory
    )
    config.data = ConfigDict(
        {
            "source": "emoji",
            "cache_dir": "~/.cache/diffjax",
            "folder": "",  # of the source "folder", or where "tfds" has its data sets
            "name": "",  # of the data set, for "tfds"
            "resolution": 64,  # of the cached pictures; a multiple of the stage's
            "split": "train",
            "flip": False,  # turn half of the pictures left to right
            "num_concepts": 0,  # 0: all of them
            "num_threads": 4,
            "image": "",  # the field of a record with the picture, "" for the usual ones; so `caption`
            "caption": "",
            "background": (255, 255, 255),  # seen through what is transparent
            "animated": "first",  # the frame of an animation that is taken; "reject": such pictures are not
            # What is larger, smaller or narrower is rejected before it is decoded.
            "limits": {
                "max_bytes": 2**27,
                "min_side": 1,
                "max_side": 2**15,
                "max_pixels": 2**26,
                "max_aspect": 10.0,
            },
            "check": "header",  # of all pictures before training; "decode": all of each, once
            "max_rejects": 0.01,  # the share of examples that may be rejected before the run stops
        }
    )
    # What stands for no text: "learned": a part of the network; "empty": the empty caption; "zeros".
    config.text = ConfigDict(
        {
            "encoder": "minilm",
            "folder": "",
            "length": 32,
            "drop": 0.1,
            "null": "learned",
            "cache": True,  # encode all captions once, before training; False: those of a batch at its step
        }
    )
    config.model = ConfigDict({"name": "unet"})  # further keys: the network's attributes
    config.diffusion = ConfigDict(
        {
            "schedule": {"name": "cosine"},
            "prediction": {"name": "v"},
            "target": {"name": "v"},  # where the error is measured
            "weighting": {"name": "unit"},
            "times": {"name": "stratified"},
            "inputs": {"name": "logsnr"},  # how the network is told the noise level
            "penalty": {"name": "squared"},
            "coupling": {"name": "independent"},  # which noise goes with which image
            "resample": False,  # draw times by how large their loss was (improved DDPM), in place of `times`
            "uncertainty": False,  # learn how the noise levels are to be balanced (EDM2)
            "vlb_weight": 0.0,  # above 0: the variance is learned too (improved DDPM: 0.001)
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-4,
            "warmup_steps": 1000,
            "decay": "cosine",  # or "constant", "inverse_sqrt"
            "decay_from": 0,  # the step from which the inverse square root of the step counts
            "b1": 0.9,
            "b2": 0.99,
            "weight_decay": 0.0,
            "clip_norm": 1.0,  # 0: gradients are not clipped
            "moments": "float32",  # or "bfloat16", "int8": how adamw keeps its moments
            "offload": False,  # keep them in the host's memory, if devices can reach it
        }
    )
    config.ema = ConfigDict({"name": "warm", "decay": 0.9999})
    config.dtype = "float32"  # of the computation; parameters are float32
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})
    config.attention = "auto"  # the kernel: "xla", "cudnn" (GPU), "flash" (TPU), or what suits the device
    config.log_every = 100
    # Saved every so many steps, and when so many minutes have passed (0: never for that reason). Kept are the
    # newest `keep`, those of every `keep_every`-th step (0: none) and the `keep_best` of the least loss.
    config.checkpoint = ConfigDict(
        {"every": 1000, "minutes": 0.0, "keep": 2, "keep_every": 0, "keep_best": 0}
    )
    # What is done about bad numbers and processes that hang; see docs/reliability.md.
    config.recovery = ConfigDict(
        {
            "max_skips": 10,  # updates in a row that are not finite, and left out, before going back
            # The robust z-score of the loss, for so many updates in a row, before going back; 0: never.
            "spike": 12.0,
            "spike_steps": 10,
            "max_rollbacks": 3,  # times that the run goes back to a checkpoint, before it stops
            "hang_minutes": 60.0,  # without a step before the process ends itself; 0: never
        }
    )
    config.preview = ConfigDict({"every": 2000, "count": 8, "sampler": sampler_config()})  # every 0: never
    # Measures of the stage alone, in training, every so many steps; 0: never. See docs/evaluation.md.
    config.eval = ConfigDict(
        {
            "every": 0,
            "num_images": 256,
            "features": "efficientnet_lite0",
            "weights": "",
            "sampler": sampler_config(),
        }
    )
    return config


def sampler_config(**changes: Any) -> ConfigDict:
    """How to sample one stage; `changes` replace whole entries."""
    values = {
        "solver": {"name": "ddim"},
        "num_steps": 50,
        "times": {"name": "uniform"},
        "guidance": {"name": "classifier_free"},
        "guidance_scale": 2.0,  # 1 is off
        "guidance_interval": (0.0, 1.0),
        "two_passes": False,  # with and without the condition one after the other: less memory
        "threshold": {"name": "dynamic", "percentile": 0.995},
        "aug_level": 0.1,
    }
    return ConfigDict({**values, **changes})


def cascade_config() -> ConfigDict:
    """A cascade: stages that were trained, and what to make with them."""
    config = ConfigDict()
    config.seed = 0
    # name -> cascade_stage(…), in any order: they are chained by their resolutions.
    config.stages = ConfigDict()
    config.prompts = ""  # several are separated by ';'
    config.prompts_file = ""  # one prompt a line
    config.num_per_prompt = 1
    config.batch_size = 64
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})
    config.attention = "auto"  # as in `stage_config`
    config.evaluate = ConfigDict(
        {
            "splits": ("train",),
            "num_prompts": 96,  # of each split, in the first look after training
            "num_images": 500,  # of each split, in --mode=evaluate
            "num_restored": 64,  # real pictures that super-resolution restores from their low resolution
            "sheet_rows": 12,
            "stage": "",  # measure what this stage makes, without those after it; "": the last one's
            "features": "efficientnet_lite0",  # what distances are measured in; "": nothing is
            "weights": "",  # the folder of that network's weights, where they come with no package
            "clip": "",  # the folder of a CLIP of transformers, for CLIP score, R-precision and CMMD
            "lpips": "",  # the folder of LPIPS's weights (AlexNet), for diversity and super-resolution
            "reference": "",  # a .npz of statistics to compare with, in place of the split's pictures
            "folder": "",  # measure the pictures in this folder, whoever made them, and sample nothing
            "baselines": True,  # measure the base stage's images too, enlarged without a network
            # How well each stage knows a split's own pictures: its error at fixed noise levels.
            "held_out": {
                "num_images": 0,  # 0: not measured
                "bits": False,  # bits per dimension too: 128 evaluations of the network for a picture
            },
            # Other values of a stage's sampler to try, beside the configured ones.
            "sweep": {
                "stage": "",  # whose sampler; "": the base stage's
                "product": False,  # all combinations of the values, rather than one change at a time
                "guidance_scale": (),
                "num_steps": (),
                "solver": (),  # names
                "aug_level": (),
                "sigma_rel": (),  # widths of the averaged parameters, for runs with ema.name="power_function"
            },
        }
    )
    return config


def cascade_stage(
    workdir: str, sampler: ConfigDict, train: ConfigDict | None = None, public: ConfigDict | None = None
) -> ConfigDict:
    """A stage of a cascade.

    Args:
      workdir: where it was trained; relative to the cascade's own working directory where `train` is given;
        "" for a stage of public weights.
      sampler: how to sample it.
      train: its configuration, if the cascade is to train it.
      public: for a stage of public weights, what of `stage_config` differs: `init_from` at least.
    """
    stage = ConfigDict({"workdir": workdir, "sampler": sampler})
    if public is not None:
        stage.public = public
    if train is not None:
        stage.train = train
    return stage


def public_config(cascade: ConfigDict, init_from: str = "init_from") -> ConfigDict:
    """What `cascade_stage` is told of a stage of public weights.

    Args:
      cascade: its configuration, with a key `resolution` and one that names the folder.
      init_from: the name of that key.
    """
    return ConfigDict(
        {
            "init_from": cascade.get_ref(init_from),
            "resolution": cascade.get_ref("resolution"),
            "told_guidance": 3.5,  # to a network that is told the guidance scale
            "dtype": "float32",
            "data": {"resolution": 0},
            "model": {"name": "public"},
        }
    )


def public_sampler(**changes: Any) -> ConfigDict:
    """A sampler whose solver, time grid and threshold are those that a checkpoint comes with."""
    public = {key: {"name": "public"} for key in ("solver", "times", "threshold")}
    return sampler_config(**{**public, "aug_level": 0.0, **changes})


def tiny(config: ConfigDict, *, resolution: int = 16, **model: Any) -> ConfigDict:
    """A recipe shrunk to ten steps on small emoji pictures, in pixels: to see on any machine that it runs.

    Args:
      config: the recipe; it is changed.
      resolution: of the pictures.
      **model: the network's attributes; its name stays.
    """
    config.resolution, config.crop = resolution, 0
    config.latent.update(channels=0, cache=False)
    config.data.update(source="emoji", split="train", resolution=64, num_concepts=10)
    config.text.update(encoder="minilm", length=8)
    with config.unlocked():
        config.model = ConfigDict({"name": config.model.name, **model})
    config.steps, config.batch_size, config.log_every = 10, 8, 5
    config.optimizer.warmup_steps = 2
    config.checkpoint.every, config.preview.every = 10, 0
    config.dtype = "float32"
    return config


def is_cascade(config: ConfigDict) -> bool:
    """Whether this is a cascade's configuration rather than a stage's."""
    return "stages" in config


def nearest(name: str, valid: Iterable[str]) -> str:
    """Advice for a name that does not exist: the nearest valid ones, else all."""
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=3)  # what was given may be a number
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(valid)}."
