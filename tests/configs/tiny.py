# A cascade of two tiny stages, each trained in seconds on a CPU; it is there for the tests and shows nothing.
#
#   python -m diffjax.main --config=tests/configs/tiny.py --workdir=/tmp/tiny

from diffjax.config import cascade_config, cascade_stage, sampler_config, stage_config


def stage(config, **model):
    train = stage_config()
    train.steps = config.get_ref("steps")
    train.batch_size = 8
    train.data.cache_dir = config.get_ref("cache_dir")
    train.data.num_concepts = 8
    train.data.num_threads = 2
    train.text.length = 16
    train.model = model
    train.optimizer.learning_rate = 1e-3
    train.optimizer.warmup_steps = 2
    train.ema.decay = 0.9
    train.log_every = 1
    train.checkpoint.every = 2
    train.preview.every = 3
    train.preview.count = 2
    train.preview.sampler.num_steps = 2
    return train


def get_config():
    config = cascade_config()
    config.steps = 6
    config.cache_dir = "~/.cache/diffjax"
    base = stage(config, name="dit", patch=4, embed=32, depth=1, heads=2)
    base.resolution = 8
    super_resolution = stage(config, name="dit", patch=4, embed=32, depth=1, heads=2, cross_attention=False)
    super_resolution.resolution = 16
    super_resolution.low_res.resolution = 8
    sampler = sampler_config(num_steps=2)
    config.stages.base = cascade_stage("base", sampler, base)
    config.stages.super_resolution = cascade_stage("super_resolution", sampler, super_resolution)
    config.prompts = "red apple; black cat"
    config.batch_size = 8
    config.evaluate.num_prompts = 8
    config.evaluate.num_images, config.evaluate.num_restored = 16, 4
    config.evaluate.sheet_rows = 2
    return config
