"""Stable Diffusion 3 and 3.5 (Esser et al., 2024), by public weights.

Command:   python -m diffjax.main --mode=sample --config=configs/pretrained/sd3.py \
             --config.init_from=FOLDER --config.prompts="a lighthouse at dawn"
           FOLDER is what `stabilityai/stable-diffusion-3-medium-diffusers` is when it has been downloaded
           whole, in safetensors: a folder with model_index.json.
Hardware:  2 B to 8 B parameters and T5-XXL's 4.7 B
Time:      not measured yet.
Result:    public weights have not been tried yet; small random folders written by diffusers give the
           original pipeline's image (tests/test_pretrained.py).

The checkpoint's own solver and time grid. 28 steps and guidance 7.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, public_config, public_sampler


def get_config() -> ConfigDict:
    config = cascade_config()
    config.init_from = ""
    config.resolution = 0  # of the images; 0: what the checkpoint was trained for
    config.batch_size = 4
    public = public_config(config)
    sampler = public_sampler(num_steps=28, guidance_scale=7.0)
    config.stages.base = cascade_stage("", sampler, public=public)
    return config
