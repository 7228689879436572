"""Super-resolution stage of the emoji cascade: 64 to 256 px, Imagen's Efficient U-Net.

Command:   python -m diffjax.main --config=configs/emoji/sr256.py --workdir=runs/emoji/sr256
Hardware:  meant for one GPU or TPU with 40 GB or more; on several, `mesh.data` takes them all.
Time:      not measured yet.
Result:    not trained yet at this size; configs/quickstart.py is the one with measured results.

It needs no base stage: in training it starts from real pictures, downsampled and noised. It can be
trained before, after or beside configs/emoji/base64.py, on another machine. It sees random crops of 128
px.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config


def get_config() -> ConfigDict:
    config = stage_config()
    config.resolution = 256
    config.crop = 128
    config.low_res.resolution = 64
    config.steps = 60_000
    config.batch_size = 128
    config.dtype = "bfloat16"
    config.data.resolution = 256
    config.model = ConfigDict(
        {
            "name": "unet",
            "efficient": True,
            "channels": 64,
            "multipliers": (1, 2, 4, 8),
            "blocks": (2, 4, 4, 4),
            "strides": (),
            "self_attention": (False, False, False, False),
            "cross_attention": (False, False, False, True),
            "head_dim": 64,
            "dropout": 0.0,
            "remat": "",
        }
    )
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 2000
    config.checkpoint.every = 2000
    config.preview.every = 2000
    config.preview.sampler = sampler_config(num_steps=30, guidance_scale=1.0, aug_level=0.1)
    return config
