"""Imagen's cascade: text to 64, 256 and 1024 px (Saharia et al., 2022), from stages that were trained
apart.

Command:   python -m diffjax.main --config=configs/imagen/cascade.py --config.prompts="a lighthouse at
           dawn"
           after configs/imagen/base64.py, sr256.py and sr1024.py with --workdir=runs/imagen/base64,
           sr256 and sr1024.
Hardware:  one accelerator
Time:      not measured.
Result:    the stages have not been trained yet.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, sampler_config


def get_config() -> ConfigDict:
    config = cascade_config()
    config.batch_size = 4
    dynamic = ConfigDict({"name": "dynamic", "percentile": 0.995})
    ancestral = ConfigDict({"name": "ddpm"})
    for name, guidance, aug_level in (("base64", 4.0, 0.0), ("sr256", 1.0, 0.2), ("sr1024", 1.0, 0.2)):
        sampler = sampler_config(
            solver=ancestral,
            num_steps=250,
            guidance_scale=guidance,
            threshold=dynamic,
            aug_level=aug_level,
        )
        config.stages[name] = cascade_stage(f"runs/imagen/{name}", sampler)
    return config
