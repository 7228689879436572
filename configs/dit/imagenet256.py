"""DiT on ImageNet at 256 px, in the latents of Stable Diffusion's autoencoder (Peebles and Xie, 2023).

Command:   python -m diffjax.main --config=configs/dit/imagenet256.py:XL/2 --config.latent.folder=FOLDER
           FOLDER: the vae/ of a Stable Diffusion 1.5 checkpoint; variants S/2, B/2, L/2, XL/2, and tiny,
           which
           needs neither FOLDER nor ImageNet.
Hardware:  published on TPU v3 pods; here not run at this size
Time:      not measured.
Result:    not trained yet. Published FID-50K of XL/2: 2.27 with guidance 1.5; of S/2, B/2, L/2 and XL/2
           after
           400k steps without guidance: 68.4, 43.5, 23.3, 19.5.

Constants of the paper and its code: AdamW at a constant 1e-4 without warm-up, decay or clipping, batch
256, EMA 0.9999, horizontal flips, classes dropped in 10 %, the variance learned, linear betas. The latents of
all pictures and of their mirror images are made once, before training, and kept in data.cache_dir
(latent.cache): 42 GB. The original encodes every batch anew, from the same distribution.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "XL/2") -> ConfigDict:
    config = stage_config()
    config.resolution = 256
    config.steps = 400_000
    config.batch_size = 256
    config.data.source, config.data.name, config.data.resolution = "tfds", "imagenet2012", 256
    config.data.flip = True
    config.latent.update(channels=4, cache=True)
    config.conditions = ("label",)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "dit", "size": f"DiT-{variant}"})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "ddpm"})
    diffusion.prediction.name = diffusion.target.name = "eps"
    diffusion.inputs.name = "timestep"
    diffusion.times = ConfigDict({"name": "uniform", "grid": 1000})
    diffusion.vlb_weight = 0.001
    config.optimizer.update(warmup_steps=1, decay="constant", b2=0.999, clip_norm=0.0)
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "ddpm"}),
        num_steps=250,
        guidance_scale=1.5,
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        small = {"patch": 4, "embed": 64, "depth": 2, "heads": 2, "classes": 2000, "text": ""}
        tiny(config, **small)
    return config
