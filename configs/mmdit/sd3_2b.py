"""A transformer like Stable Diffusion 3's, 2 B parameters, on text-image pairs at 512 px (Esser et al.,
2024).

Command:   python -m diffjax.main --config=configs/mmdit/sd3_2b.py --config.data.folder=IMAGES \
             --config.latent.folder=FOLDER/vae --config.text.folder=FOLDER
           FOLDER: a Stable Diffusion 3 checkpoint, for its autoencoder and text encoders; IMAGES:
           pictures with
           captions in .txt files beside them. Variant tiny needs neither.
Hardware:  many accelerators; not run at this size here
Time:      not measured.
Result:    not trained yet.

Rectified flow with logit-normal(0, 1) times, sixteen latent channels, two CLIPs and T5; QK norm,
without which half precision diverges. As there, the latents of all pictures are made once, before training,
and kept in data.cache_dir (latent.cache): 0.26 MB a picture.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny


def get_config(variant: str = "") -> ConfigDict:
    config = stage_config()
    config.resolution = 512
    config.steps = 500_000
    config.batch_size = 1024
    config.data.source, config.data.resolution = "folder", 512
    config.latent.update(channels=16, cache=True)
    config.text.update(encoder="public", length=333, drop=0.1, null="empty")
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "mmdit", "size": "2b", "remat": "full"})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "linear_flow"})
    diffusion.prediction.name = diffusion.target.name = "velocity"
    diffusion.inputs.name = "time"
    diffusion.times = ConfigDict({"name": "logit_normal"})
    config.optimizer.update(b2=0.999, decay="constant")
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "euler"}),
        num_steps=28,
        guidance_scale=5.0,
        times=ConfigDict({"name": "shifted", "shift": 3.0}),
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        shape = {"depth": 2, "heads": 2, "head_dim": 16, "patch": 4, "in_channels": 3, "qk_norm": "rms"}
        widths = {"text_embed": 384, "pooled_embed": 384, "max_size": 8, "base_size": 4}
        tiny(config, **shape, **widths)
    return config
