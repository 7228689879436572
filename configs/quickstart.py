from diffjax.config import cascade_config, cascade_stage, sampler_config, stage_config


def get_config():
    config = cascade_config()
    config.steps = 2000
    config.sr_steps = 600
    base = stage_config()
    base.resolution = 16
    base.steps = config.get_ref("steps")
    base.batch_size = 32
    base.data.num_concepts = 200
    base.text.length = 24
    base.model = {"name": "dit", "patch": 4, "embed": 256, "depth": 6, "heads": 4, "cross_attention": False}
    base.optimizer.learning_rate = 1e-3
    base.optimizer.warmup_steps = 200
    base.ema_decay = 0.999
    base.checkpoint.every = 500
    base.preview.every = 500
    config.stages.base = cascade_stage("base", sampler_config(num_steps=25), base)
    return config
