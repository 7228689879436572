"""DeepFloyd IF (2023), the public Imagen: stage I makes 64 px from text, stage II brings them to 256 px.

Command:   python -m diffjax.main --mode=sample --config=configs/pretrained/deepfloyd.py \
             --config.init_from=FOLDER --config.sr_init_from=FOLDER_II --config.prompts="a lighthouse at
           dawn"
           FOLDER is what `DeepFloyd/IF-I-M-v1.0` is when it has been downloaded whole, in safetensors;
           FOLDER_II the same of `DeepFloyd/IF-II-M-v1.0`; without it, stage I alone is sampled.
Hardware:  0.4 B to 4.3 B parameters and T5-XXL's 4.7 B
Time:      not measured yet.
Result:    public weights have not been tried yet; small random folders written by diffusers give the
           original pipeline's image (tests/test_pretrained.py).

The checkpoints' own solver (ancestral, with the learned variance), time grid and threshold; 100 and 50
steps, guidance 7 and 4, and noise of step 250 of 1000, which is our time 0.251, on the images that
stage II starts from, as the original pipeline has it.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, public_config, public_sampler


def get_config() -> ConfigDict:
    config = cascade_config()
    config.init_from = ""
    config.sr_init_from = ""
    config.resolution = 0  # of stage I; 0: what the checkpoint was trained for
    config.sr_resolution = 0  # of stage II
    config.batch_size = 4
    base = public_sampler(num_steps=100, guidance_scale=7.0)
    sr = public_sampler(num_steps=50, guidance_scale=4.0, aug_level=0.251)
    config.stages.base = cascade_stage("", base, public=public_config(config))
    public = public_config(config, "sr_init_from")
    public.resolution = config.get_ref("sr_resolution")
    config.stages.sr = cascade_stage("", sr, public=public)
    return config
