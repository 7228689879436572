"""Imagen's second super-resolution stage: 256 to 1024 px (Saharia et al., 2022).

Command:   python -m diffjax.main --config=configs/imagen/sr1024.py:600m --config.data.folder=IMAGES \
             --config.text.folder=FOLDER
           IMAGES: pictures with captions in .txt files beside them (or --config.data.source=tfds
           --config.data.name=coco_captions); FOLDER: a checkpoint with T5-XXL's encoder, such as
           DeepFloyd IF's.
           Variants 600m and tiny, which needs neither.
Hardware:  published on TPU v4 pods; not run at this size here
Time:      not measured.
Result:    not trained yet. No figure is published for this stage alone.

Constants of the paper: batch 2048, 2.5 M steps, learning rate 1e-4 after 10,000 steps of warm-up, EMA
0.9999, text dropped in 10 %, the cosine schedule, Adam for super-resolution; noise of any level on the
low-resolution image, crops of 256 px from 1024. The size of the network is that of NVIDIA's Imagen recipes,
611 M parameters with T5-XXL's text; the paper's has 400 M.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "600m") -> ConfigDict:
    config = stage_config()
    config.resolution = 1024
    config.low_res.resolution = 256
    config.crop = 256
    config.batch_size = 2048
    config.steps = 2_500_000
    config.data.source, config.data.resolution = "folder", 1024
    config.text.update(encoder="public", length=128, drop=0.1)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "unet", "size": f"sr1024-{variant}", "remat": "full"})
    config.optimizer.update(name="adamw", warmup_steps=10_000, b2=0.999, decay="constant")
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "ddpm"}),
        num_steps=250,
        guidance_scale=1.0,
        threshold=ConfigDict({"name": "dynamic", "percentile": 0.995}),
        aug_level=0.2,
    )
    if variant == "tiny":
        shape = {"channels": 16, "multipliers": (1, 2), "blocks": (1, 1), "efficient": True}
        flags = {"self_attention": (False, False), "cross_attention": (False, True), "head_dim": 16}
        tiny(config, **shape, **flags)
        config.low_res.resolution = 4
    return config
