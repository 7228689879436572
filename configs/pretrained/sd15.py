"""Stable Diffusion 1.5, 2 and SDXL (Rombach et al., 2022; Podell et al., 2023), by public weights.

Command:   python -m diffjax.main --mode=sample --config=configs/pretrained/sd15.py \
             --config.init_from=FOLDER --config.prompts="a lighthouse at dawn"
           FOLDER is what `stable-diffusion-v1-5/stable-diffusion-v1-5` is when it has been downloaded
           whole, in safetensors: a folder with model_index.json.
Hardware:  0.9 B parameters (SDXL: 2.6 B)
Time:      not measured yet.
Result:    public weights have not been tried yet; small random folders written by diffusers give the
           original pipeline's image (tests/test_pretrained.py).

The checkpoint's own solver and time grid. 50 steps and guidance 7.5, the usual choice.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, public_config, public_sampler


def get_config() -> ConfigDict:
    config = cascade_config()
    config.init_from = ""
    config.resolution = 0  # of the images; 0: what the checkpoint was trained for
    config.batch_size = 4
    public = public_config(config)
    sampler = public_sampler(num_steps=50, guidance_scale=7.5)
    config.stages.base = cascade_stage("", sampler, public=public)
    return config
