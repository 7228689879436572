"""PixArt-alpha (Chen et al., 2023): text to images, by public weights.

Command:   python -m diffjax.main --mode=sample --config=configs/pretrained/pixart.py \
             --config.init_from=FOLDER --config.prompts="a lighthouse at dawn"
           FOLDER is what `PixArt-alpha/PixArt-XL-2-512x512` is when it has been downloaded
           whole, in safetensors: a folder with model_index.json.
Hardware:  0.6 B parameters and T5-XXL's 4.7 B: 24 GB in float32
Time:      not measured yet.
Result:    public weights have not been tried yet; small random folders written by diffusers give the
           original pipeline's image (tests/test_pretrained.py).

The checkpoint's own solver and time grid. 20 steps and guidance 4.5, as its authors do.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, public_config, public_sampler


def get_config() -> ConfigDict:
    config = cascade_config()
    config.init_from = ""
    config.resolution = 0  # of the images; 0: what the checkpoint was trained for
    config.batch_size = 4
    public = public_config(config)
    sampler = public_sampler(num_steps=20, guidance_scale=4.5)
    config.stages.base = cascade_stage("", sampler, public=public)
    return config
