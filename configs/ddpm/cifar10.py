"""DDPM on CIFAR-10 (Ho et al., 2020).

Command:   python -m diffjax.main --config=configs/ddpm/cifar10.py
           variant tiny does not need CIFAR-10.
Hardware:  published on a TPU v3-8; here not run in full
Time:      not measured.
Result:    not trained yet. Published FID-50K: 3.17.

Linear betas, 1000 steps, eps with a plain squared error, Adam at a constant 2e-4 after 5000 steps of
warm-up, gradients clipped at 1, batch 128, EMA 0.9999, dropout 0.1, horizontal flips, 800k steps.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "") -> ConfigDict:
    config = stage_config()
    config.resolution = 32
    config.steps = 800_000
    config.batch_size = 128
    config.data.source, config.data.name, config.data.resolution = "tfds", "cifar10", 32
    config.data.flip = True
    config.conditions = ()
    config.model = ConfigDict({"name": "unet2d", "size": "DDPM-CIFAR10", "dropout": 0.1})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "ddpm"})
    diffusion.prediction.name = diffusion.target.name = "eps"
    diffusion.inputs.name = "timestep"
    diffusion.times = ConfigDict({"name": "uniform", "grid": 1000})
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, decay="constant", b2=0.999)
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "ddpm"}),
        num_steps=1000,
        guidance_scale=1.0,
        threshold=ConfigDict({"name": "static"}),
    )
    if variant == "tiny":
        shape = {"channels": (16, 32), "blocks": (1, 1), "attention": ("", "self"), "heads": (1, 1)}
        tiny(config, **shape, resample=("conv", "conv"), groups=8)
    return config
