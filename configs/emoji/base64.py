"""Base stage of the emoji cascade at full size: 64 px, Imagen's U-Net with 137 M parameters.

Command:   python -m diffjax.main --config=configs/emoji/base64.py --workdir=runs/emoji/base64
Hardware:  meant for one GPU or TPU with 40 GB or more; on several, `mesh.data` takes them all.
Time:      not measured yet.
Result:    not trained yet at this size; configs/quickstart.py is the one with measured results.

Network, 10 % dropped text, cosine schedule and EMA after Imagen (Saharia et al., 2022), at half its
width; batch and steps are smaller because there are 3,483 pictures rather than hundreds of millions.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config


def get_config() -> ConfigDict:
    config = stage_config()
    config.resolution = 64
    config.steps = 60_000
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.data.resolution = 256  # the cache that the super-resolution stage uses too
    config.model = ConfigDict(
        {
            "name": "unet",
            "channels": 128,
            "multipliers": (1, 2, 3, 4),
            "blocks": (3, 3, 3, 3),
            "self_attention": (False, True, True, True),
            "cross_attention": (False, True, True, True),
            "head_dim": 64,
            "dropout": 0.1,
            "remat": "",
        }
    )
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 2000
    config.checkpoint.every = 2000
    config.preview.every = 2000
    config.preview.count = 12
    config.preview.sampler = sampler_config(num_steps=50, guidance_scale=3.0)
    return config
