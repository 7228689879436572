"""Flow matching on CIFAR-10, without classes (Lipman et al., 2023; Tong et al., 2024).

Command:   python -m diffjax.main --config=configs/flow/cifar10.py
           variants: ot couples noise and images by minibatch optimal transport; tiny does not need
           CIFAR-10.
Hardware:  not run in full here
Time:      not measured.
Result:    not trained yet. Published FID-50K of torchcfm's recipe: about 3.5.

The straight path and its velocity; Adam at 2e-4 after 5000 steps of warm-up, batch 128, EMA 0.9999,
400k steps.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "") -> ConfigDict:
    config = stage_config()
    config.resolution = 32
    config.steps = 400_000
    config.batch_size = 128
    config.data.source, config.data.name, config.data.resolution = "tfds", "cifar10", 32
    config.data.flip = True
    config.conditions = ()
    config.model = ConfigDict({"name": "unet2d", "size": "DDPM-CIFAR10", "dropout": 0.1})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "linear_flow"})
    diffusion.prediction.name = diffusion.target.name = "velocity"
    diffusion.inputs.name = "time"
    diffusion.times.name = "uniform"
    if variant == "ot":
        diffusion.coupling.name = "exact"
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, decay="constant", b2=0.999)
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "midpoint"}),
        num_steps=50,
        guidance_scale=1.0,
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        shape = {"channels": (16, 32), "blocks": (1, 1), "attention": ("", "self"), "heads": (1, 1)}
        tiny(config, **shape, resample=("conv", "conv"), groups=8)
    return config
