"""JiT: a plain transformer on the pixels of ImageNet at 256 px, in patches of 16 (Li and He, 2025).

Command:   python -m diffjax.main --config=configs/jit/imagenet256.py:B/16
           variants B/16, L/16, H/16, and tiny, which does not need ImageNet.
Hardware:  not run at this size here
Time:      not measured.
Result:    not trained yet. Published FID-50K: B/16 after 200 epochs 7.48, with rotary positions, QK norm
           and class
           tokens 5.49; L/16 3.39.

The network predicts x0; the error is that of the velocity, whose division by t stops at 0.05. Times are
sigmoid(N(0.8, 0.8)) in our direction, where t = 1 is noise. AdamW (0.9, 0.95), 5e-5 for each 256 of the
batch, 5 epochs of warm-up, then constant; EMA 0.9999. Guidance 2.9 (B) or 2.2 (H), where t is below
0.9.
"""

from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config, tiny

EPOCH = 1_281_167 // 1024  # steps


def get_config(variant: str = "B/16") -> ConfigDict:
    config = stage_config()
    config.resolution = 256
    config.steps = 200 * EPOCH
    config.batch_size = 1024
    config.data.source, config.data.name, config.data.resolution = "tfds", "imagenet2012", 256
    config.data.flip = True
    config.conditions = ("label",)
    config.dtype = "bfloat16"
    config.model = ConfigDict({"name": "dit", "size": f"JiT-{variant}"})
    diffusion = config.diffusion
    diffusion.schedule = ConfigDict({"name": "linear_flow"})
    diffusion.prediction.name = diffusion.target.name = "x0"
    diffusion.weighting = ConfigDict({"name": "velocity_clipped"})
    diffusion.inputs.name = "time"
    diffusion.times = ConfigDict({"name": "logit_normal", "mean": 0.8, "std": 0.8})
    config.optimizer.update(
        learning_rate=2e-4, warmup_steps=5 * EPOCH, decay="constant", b2=0.95, clip_norm=0.0
    )
    config.preview.sampler = sampler_config(
        solver=ConfigDict({"name": "heun"}),
        num_steps=50,
        guidance_scale=2.9,
        guidance_interval=(0.0, 0.9),
        threshold=ConfigDict({"name": "none"}),
    )
    if variant == "tiny":
        shape = {
            "patch": 4,
            "embed": 64,
            "depth": 3,
            "heads": 2,
            "bottleneck": 16,
            "classes": 2000,
            "text": "",
        }
        kind = {"norm": "rms", "qk_norm": "rms", "activation": "silu", "gated": True}
        tokens = {"positions": "sincos+rotary", "class_tokens": 4, "class_tokens_from": 1}
        tiny(config, **shape, **kind, **tokens)
    return config
