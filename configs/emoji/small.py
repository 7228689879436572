"""The emoji cascade at a size for two CPU cores: the quickstart's networks on all 3,483 training pictures.

Command:   python -m diffjax.main --config=configs/emoji/small.py --workdir=runs/emoji/small --mode=train
           python -m diffjax.main --config=configs/emoji/small.py --workdir=runs/emoji/small --mode=evaluate
Hardware:  two CPU cores (AMD EPYC with AVX-512)
Time:      15 min 39 s: base 9 min 53 s, super-resolution 5 min 9 s; evaluation 3 min 32 s
Result:    too short for so many pictures: caption retrieval among the training pictures top5 8.2 % (shuffled
           prompts: 0.4 %), of held-out concepts 3.8 % (0.0 %); super-resolution restores held-out pictures at
           19.2 dB (bilinear: 17.8 dB)

Concepts are held out altogether, or in one of their two styles: these splits say what the cascade makes
of captions that it was not trained on. docs/results.md has the tables.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.steps, config.sr_steps = 4000, 1600
    config.evaluate.splits = ("train", "heldout_concepts", "heldout_pairs")
    for stage in (config.stages.base.train, config.stages.sr.train):
        stage.data.num_concepts = 0
    return config
