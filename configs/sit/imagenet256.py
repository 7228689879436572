"""SiT: DiT's network trained by flow matching on ImageNet at 256 px (Ma et al., 2024).

Command:   python -m diffjax.main --config=configs/sit/imagenet256.py:XL/2 --config.latent.folder=FOLDER
           FOLDER: the vae/ of a Stable Diffusion 1.5 checkpoint; variants S/2, B/2, L/2, XL/2, and tiny,
           which
           needs neither FOLDER nor ImageNet.
Hardware:  published on TPU v4 pods; here not run at this size
Time:      not measured.
Result:    not trained yet. Published FID-50K of XL/2: 2.06 with guidance 1.5 and the SDE sampler.

DiT's recipe with the straight path and the velocity; the original's t runs the other way. It learns the
mean alone: half of the network's outputs are not used there, and are left out here.
The latents of all pictures and of their mirror images are made once, before training, and kept in
data.cache_dir (latent.cache): 42 GB.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "XL/2") -> ConfigDict:
    config = stage_config()
    config.resolution = 256
    config.steps = 7_000_000
    config.batch_size = 256
    config.data.source, config.data.name, config.data.resolution = "tfds", "imagenet2012", 256
    config.data.flip = True
    config.latent.update(channels=4, cache=True)
    config.conditions = ("label",)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "dit", "size": f"DiT-{variant}"})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "linear_flow"})
    diffusion.prediction.name = diffusion.target.name = "velocity"
    diffusion.inputs.name = "time"
    diffusion.times.name = "uniform"
    config.optimizer.update(warmup_steps=1, decay="constant", b2=0.999, clip_norm=0.0)
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "heun"}),
        num_steps=125,
        guidance_scale=1.5,
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        small = {"patch": 4, "embed": 64, "depth": 2, "heads": 2, "classes": 2000, "text": ""}
        tiny(config, **small)
    return config
