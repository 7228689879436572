"""Imagen's base stage: text to 64 px (Saharia et al., 2022).

Command:   python -m diffjax.main --config=configs/imagen/base64.py:500m --config.data.folder=IMAGES \
             --config.text.folder=FOLDER
           IMAGES: pictures with captions in .txt files beside them (or --config.data.source=tfds
           --config.data.name=coco_captions); FOLDER: a checkpoint with T5-XXL's encoder, such as
           DeepFloyd IF's.
           Variants 2b (the paper's), 500m (NVIDIA's) and tiny, which needs neither.
Hardware:  published on TPU v4 pods; not run at this size here
Time:      not measured.
Result:    not trained yet. FID-30K on COCO at 256 px of NVIDIA's base and first SR: 11.30 at guidance 2.

Constants of the paper: batch 2048, 2.5 M steps, learning rate 1e-4 after 10,000 steps of warm-up, EMA
0.9999, text dropped in 10 %, the cosine schedule, Adafactor for the base; dynamic thresholding at
0.995. The sizes of the networks are those of NVIDIA's Imagen recipes, of 2.2 B and 556 M parameters
with T5-XXL's text.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "500m") -> ConfigDict:
    config = stage_config()
    config.resolution = 64
    config.batch_size = 2048
    config.steps = 2_500_000
    config.data.source, config.data.resolution = "folder", 64
    config.text.update(encoder="public", length=128, drop=0.1)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "unet", "size": f"base64-{variant}", "remat": "full"})
    config.optimizer.update(name="adafactor", warmup_steps=10_000, b2=0.999, decay="constant")
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "ddpm"}),
        num_steps=250,
        guidance_scale=2.0,
        threshold=ConfigDict({"name": "dynamic", "percentile": 0.995}),
        aug_level=0.0,
    )
    if variant == "tiny":
        shape = {"channels": 16, "multipliers": (1, 2), "blocks": (1, 1), "efficient": False}
        flags = {"self_attention": (False, True), "cross_attention": (False, True), "head_dim": 16}
        tiny(config, **shape, **flags)
    return config
