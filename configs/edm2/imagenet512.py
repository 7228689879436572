"""EDM2 on ImageNet at 512 px, in latents (Karras et al., 2024).

Command:   python -m diffjax.main --config=configs/edm2/imagenet512.py:s --config.latent.folder=FOLDER
           FOLDER: the vae/ of a Stable Diffusion 1.5 checkpoint; variants xs, s, m, l, xl, xxl, and
           tiny, which
           needs neither FOLDER nor ImageNet.
Hardware:  published on 32 A100; here not run at this size
Time:      not measured.
Result:    not trained yet. Published FID-50K without guidance: xs 3.53, s 2.56, m 2.25, l 2.06, xl 1.96,
           xxl 1.91.

Batch 2048, ln sigma ~ N(-0.4, 1.0), Adam (0.9, 0.99), the learning rate warmed up over 10 M images and
falling with the square root of the step from 70,000 steps on, the uncertainty learned, EMA of relative
width 0.1. The paper gives the learning rates of xs (0.012) and xxl (0.0065); those between are
interpolated by the width here. Its latents are brought to standard deviation 0.5 by constants of each
channel; here they have the usual scale, so sigma_data is 1.
As there, the latents are made once, before training, and kept in data.cache_dir (latent.cache): 84 GB.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny

RATES = {"xs": 0.012, "s": 0.010, "m": 0.009, "l": 0.008, "xl": 0.007, "xxl": 0.0065}


def get_config(variant: str = "s") -> ConfigDict:
    config = stage_config()
    config.resolution = 512
    config.steps = 1_000_000
    config.batch_size = 2048
    config.data.source, config.data.name, config.data.resolution = "tfds", "imagenet2012", 512
    config.latent.update(channels=4, cache=True)
    config.conditions = ("label",)
    config.text.drop = 0.0
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "edm2", "size": variant})
    diffusion = config.diffusion
    data = {"sigma_data": 1.0}
    diffusion.schedule = ConfigDict({"name": "edm"})
    diffusion.prediction = ConfigDict({"name": "edm", **data})
    diffusion.target = ConfigDict({"name": "edm", **data})
    diffusion.inputs = ConfigDict({"name": "edm", **data})
    diffusion.times = ConfigDict({"name": "log_normal_sigma", "mean": -0.4, "std": 1.0})
    diffusion.uncertainty = True
    config.optimizer.update(
        learning_rate=RATES.get(variant, 0.01),
        warmup_steps=4883,
        decay="inverse_sqrt",
        decay_from=70_000,
        clip_norm=0.0,
    )
    config.ema = ConfigDict({"name": "power_function", "sigma_rel": 0.1})
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "heun"}),
        num_steps=32,
        guidance_scale=1.0,
        times=ConfigDict({"name": "karras"}),
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        shape = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (False, True)}
        tiny(config, **shape, head_dim=16, classes=2000)
    return config
