"""Imagen's first super-resolution stage: 64 to 256 px (Saharia et al., 2022).

Command:   python -m diffjax.main --config=configs/imagen/sr256.py:600m --config.data.folder=IMAGES \
             --config.text.folder=FOLDER
           IMAGES: pictures with captions in .txt files beside them (or --config.data.source=tfds
           --config.data.name=coco_captions); FOLDER: a checkpoint with T5-XXL's encoder, such as
           DeepFloyd IF's.
           Variants 600m, 400m (NVIDIA's) and tiny, which needs neither.
Hardware:  published on TPU v4 pods; not run at this size here
Time:      not measured.
Result:    not trained yet. See base64.py.

Constants of the paper: batch 2048, 2.5 M steps, learning rate 1e-4 after 10,000 steps of warm-up, EMA
0.9999, text dropped in 10 %, the cosine schedule, Adam for super-resolution; noise of any level on the
low-resolution image. The sizes of the networks are those of NVIDIA's Imagen recipes, of 624 M and 413 M
parameters with T5-XXL's text.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "600m") -> ConfigDict:
    config = stage_config()
    config.resolution = 256
    config.low_res.resolution = 64
    config.batch_size = 2048
    config.steps = 2_500_000
    config.data.source, config.data.resolution = "folder", 256
    config.text.update(encoder="public", length=128, drop=0.1)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "unet", "size": f"sr256-{variant}", "remat": "full"})
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
        flags = {"self_attention": (False, True), "cross_attention": (False, True), "head_dim": 16}
        tiny(config, **shape, **flags)
        config.low_res.resolution = 8
    return config
