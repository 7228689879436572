"""The emoji cascade: samples from the stages that base64.py and sr256.py trained.

Command:   python -m diffjax.main --config=configs/emoji/cascade.py --mode=sample \
               --config.prompts="an openmoji of a red apple; a twemoji of an owl"
           python -m diffjax.main --config=configs/emoji/cascade.py --mode=evaluate
Hardware:  what the stages were trained on, or less.
Time:      not measured yet.
Result:    the stages are not trained yet at this size; configs/quickstart.py has measured results.

Evaluation measures 500 samples each, and makes a report, for captions of the training pictures, for concepts
that were never shown, and for concepts that were shown in the other style only. See docs/evaluation.md.
"""

from ml_collections import ConfigDict

from diffjax.config import cascade_config, cascade_stage, sampler_config


def get_config() -> ConfigDict:
    config = cascade_config()
    config.batch_size = 16
    config.stages.base = cascade_stage(
        "runs/emoji/base64", sampler_config(num_steps=100, guidance_scale=3.0, aug_level=0.0)
    )
    config.stages.sr = cascade_stage(
        "runs/emoji/sr256",
        sampler_config(num_steps=50, guidance_scale=1.0, threshold={"name": "static"}, aug_level=0.1),
    )
    config.evaluate.splits = ("train", "heldout_concepts", "heldout_pairs")
    config.evaluate.num_prompts = 192
    return config
