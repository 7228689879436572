"""DiT (Peebles and Xie, 2023): ImageNet classes to images, by public weights.

Command:   python -m diffjax.main --mode=sample --config=configs/pretrained/dit.py \
             --config.init_from=FOLDER --config.prompts="golden retriever; 207"
           FOLDER is what `facebook/DiT-XL-2-256` is when it has been downloaded
           whole, in safetensors: a folder with model_index.json.
Hardware:  any; the XL/2 network has 675 M parameters
Time:      not measured yet.
Result:    public weights have not been tried yet; small random folders written by diffusers give the
           original pipeline's image (tests/test_pretrained.py).

The checkpoint's own solver and time grid. 250 steps and guidance 4, as its authors sample for display
(1.5 for the best FID).
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, public_config, public_sampler


def get_config() -> ConfigDict:
    config = cascade_config()
    config.init_from = ""
    config.resolution = 0  # of the images; 0: what the checkpoint was trained for
    config.batch_size = 4
    public = public_config(config)
    sampler = public_sampler(num_steps=250, guidance_scale=4.0)
    config.stages.base = cascade_stage("", sampler, public=public)
    return config
