"""Make the golden values of guidance with diffusers.

Writes `guidance.npz` next to this file. The arrays are named `CASE/WHAT`; images are NCHW.

In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 numpy
    python tests/golden/make_guidance.py
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import RePaintScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

PROJECTED = [  # eta, norm_threshold, whether it starts at the negative, scale
    (0.0, 15.0, True, 7.5),
    (0.0, 8.0, False, 4.0),
    (0.3, 0.0, False, 2.0),
    (1.0, 5.0, False, 7.5),
    (0.5, 10.0, True, 0.5),
]
RESAMPLED = [(6, 2, 3), (10, 3, 2), (10, 1, 2), (7, 10, 3), (12, 4, 1), (50, 10, 10)]  # steps, jump, repeats


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    shape = (2, 3, 5, 4)
    positive, negative = normal(*shape, seed=0), normal(*shape, seed=1)
    result = {"positive": positive, "negative": negative}

    for phi in (0.0, 0.7, 1.0):
        guider = ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=phi)
        result[f"rescaled/{phi}"] = guider.forward(positive, negative).pred

    for number, (eta, threshold, from_negative, scale) in enumerate(PROJECTED):
        weight = scale if from_negative else scale - 1.0  # of the original formulation: the paper's w - 1
        guided = normalized_guidance(
            positive, negative, weight, None, eta, threshold, use_original_formulation=not from_negative
        )
        result[f"apg/{number}/guided"] = guided
        result[f"apg/{number}/settings"] = torch.tensor([eta, threshold or np.inf, from_negative, scale])

    for momentum in (-0.5, 0.25):  # one buffer over the steps of a trajectory
        buffer = MomentumBuffer(momentum)
        steps = [(normal(*shape, seed=10 + i), normal(*shape, seed=20 + i)) for i in range(4)]
        guided = [normalized_guidance(p, n, 3.0, buffer, 0.25, 9.0, True) for p, n in steps]
        result |= {f"momentum/{momentum}": torch.stack(guided)}
    result["momentum/positive"], result["momentum/negative"] = (
        torch.stack(s) for s in zip(*steps, strict=True)
    )

    for number, (steps, jump, repeats) in enumerate(RESAMPLED):
        scheduler = RePaintScheduler(num_train_timesteps=steps)
        scheduler.set_timesteps(steps, jump, repeats)
        result[f"repaint/{number}/settings"] = torch.tensor([steps, jump, repeats])
        result[f"repaint/{number}/path"] = scheduler.timesteps

    scheduler = RePaintScheduler(num_train_timesteps=100, eta=1.0, clip_sample=False)
    scheduler.set_timesteps(10, 5, 1)
    known, eps, x = (normal(*shape, seed=30 + i) for i in range(3))
    mask = (normal(*shape, seed=33) > 0.0).float()
    step = scheduler.step(eps, 50, x, known, mask, generator=torch.Generator().manual_seed(34))
    result |= {"repaint_step/known": known, "repaint_step/eps": eps, "repaint_step/x": x}
    result |= {"repaint_step/mask": mask, "repaint_step/noise": normal(*shape, seed=34)}
    result |= {"repaint_step/result": step.prev_sample, "repaint_step/x0": step.pred_original_sample}
    result |= {"repaint_step/alphas": scheduler.alphas_cumprod[[50, 40]].sqrt()}

    arrays = {name: value.numpy() for name, value in result.items()}
    np.savez_compressed(Path(__file__).parent / "guidance.npz", **arrays)


if __name__ == "__main__":
    main()
