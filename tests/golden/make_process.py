"""Make the golden samples of diffusers' schedulers, each with the file that it saves.

Writes `process.npz` next to this file: by a number, `config` (the scheduler's JSON and how it was called)
and `final`, what it makes of `start` with the numbers `noise`. `estimate` stands in for a network, and the
test has the same. In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 numpy
    python tests/golden/make_process.py
"""

import itertools
import json
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch

HERE = Path(__file__).parent
MEAN, STD = 0.3, 0.5
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FREE = {"clip_sample": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.2}
TOKENS = {"even": True, "tokens": 1024}
FLOW, MU = "FlowMatchEulerDiscrete", 0.5 + 0.65 * (1024 - 256) / (4096 - 256)

GENERATOR = torch.Generator().manual_seed(0)
START = torch.randn(2, 3, 2, 2, generator=GENERATOR)
NOISE = torch.randn(12, 2, 3, 2, 2, generator=GENERATOR)

# The class, the number of steps, the settings, how the pipeline calls it.
CASES = [
    ("DDIM", 10, {"steps_offset": 1, "set_alpha_to_one": False, **FREE, **SD}, {}),
    ("DDIM", 10, {"set_alpha_to_one": False, **FREE, **SD}, {}),
    ("DDIM", 12, {**FREE, **SD}, {}),
    ("DDIM", 10, {**ZERO_SNR, **FREE, **SD}, {}),
    ("DDPM", 7, {"timestep_spacing": "linspace", **FREE}, {}),
    ("DDPM", 10, {"variance_type": "learned_range", **FREE}, {}),
    ("DDPM", 10, {"beta_schedule": "squaredcos_cap_v2", **DYNAMIC}, {}),
    (
        "DDPM",
        10,
        {"trained_betas": np.linspace(0.01, 0.2, 50).tolist(), "num_train_timesteps": 50, **FREE},
        {},
    ),
    ("PNDM", 10, {"skip_prk_steps": True, "steps_offset": 1, **SD}, {}),
    ("EulerDiscrete", 7, {**SD}, {}),
    ("EulerDiscrete", 10, {"use_karras_sigmas": True, **SD}, {}),
    ("EulerDiscrete", 10, {**ZERO_SNR, **SD}, {}),
    ("EulerAncestralDiscrete", 10, {"timestep_spacing": "trailing", **SD}, {}),
    ("HeunDiscrete", 10, {"use_karras_sigmas": True}, {}),
    ("DPMSolverMultistep", 10, {**SD}, {}),
    ("DPMSolverMultistep", 10, {"use_karras_sigmas": True, **SD}, {}),
    ("DPMSolverMultistep", 10, {"algorithm_type": "sde-dpmsolver++", **SD}, {}),
    ("DPMSolverMultistep", 10, {**ZERO_SNR, **SD}, {}),
    ("UniPCMultistep", 10, {**SD, **DYNAMIC}, {}),
    ("UniPCMultistep", 10, {"solver_type": "bh1", "final_sigmas_type": "sigma_min", **SD}, {}),
    ("LCM", 7, {"clip_sample": True, "timestep_scaling": 0.01, "original_inference_steps": 40}, {}),
    (FLOW, 10, {"shift": 3.0}, {}),
    (FLOW, 10, {"shift": 3.0}, {"even": True}),
    (FLOW, 10, {"use_dynamic_shifting": True, "shift": 3.0}, TOKENS),
    (FLOW, 10, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, TOKENS),
    (FLOW, 10, {"stochastic_sampling": True}, {}),
]


def estimate(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps in x, `alpha x0 + sigma eps = x`: of Gaussian data, and something that is not linear."""
    centred = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    bend = 0.1 * torch.tanh(2.0 * x / (alpha**2 + sigma**2) ** 0.5)
    return MEAN + alpha * STD**2 * centred - sigma * bend, sigma * centred + alpha * bend


def network(scheduler, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The network knows the noise level by what it is told, the number of the step."""
    if hasattr(scheduler, "alphas_cumprod"):
        signal = np.interp(timestep, np.arange(len(scheduler.alphas_cumprod)), scheduler.alphas_cumprod)
        alpha = torch.tensor(signal, dtype=torch.float32) ** 0.5
        sigma = (1.0 - alpha**2) ** 0.5
    else:
        sigma = timestep / scheduler.config.num_train_timesteps
        alpha = 1.0 - sigma
    x0, eps = estimate(x, alpha, sigma)
    kind = scheduler.config.get("prediction_type", "flow")
    output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[kind]
    learned = scheduler.config.get("variance_type") == "learned_range"
    return torch.cat([output, torch.tanh(x)], dim=1) if learned else output


def sample(scheduler, num_steps: int, *, even: bool = False, tokens: int = 0) -> torch.Tensor:
    """What the scheduler makes of START, at its own scale."""
    call = {"mu": MU} if tokens else {}
    if even:
        call["sigmas"] = np.linspace(1.0, 1.0 / num_steps, num_steps)
    else:
        call["num_inference_steps"] = num_steps
    scheduler.set_timesteps(**call)
    y = START * getattr(scheduler, "init_noise_sigma", 1.0)
    numbers = itertools.count()
    draw = mock.Mock(side_effect=lambda *args, **kwargs: NOISE[next(numbers)])
    with mock.patch(f"{type(scheduler).__module__}.randn_tensor", draw, create=True):
        for timestep in scheduler.timesteps:
            inner = scheduler.scale_model_input(y, timestep) if hasattr(scheduler, "scale_model_input") else y
            y = scheduler.step(network(scheduler, inner, timestep), timestep, y).prev_sample
    return y


if __name__ == "__main__":
    arrays = {"start": START.numpy(), "noise": NOISE.numpy()}
    for number, (name, num_steps, settings, call) in enumerate(CASES):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
        saved = json.loads(scheduler.to_json_string())
        arrays[f"{number}/config"] = np.asarray(json.dumps([saved, {"num_steps": num_steps, **call}]))
        arrays[f"{number}/final"] = sample(scheduler, num_steps, **call).numpy()
    np.savez_compressed(HERE / "process.npz", **arrays)
