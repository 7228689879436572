"""Make the golden values of the training mathematics with three PyTorch libraries.

Writes `training_maths.npz` next to this file: densities of times, weights of losses, moving averages.

In an environment of its own:

    pip install torch==2.15.0 torchvision diffusers==0.42.1 k-diffusion==0.1.1 ema-pytorch==0.8.3 numpy
    python tests/golden/make_training_maths.py
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import (
    EMAModel,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma, solve_weights
from k_diffusion.layers import Denoiser

HERE = Path(__file__).parent


def times() -> dict[str, object]:
    """diffusers: SD3's densities, the mode function at given u, and FLUX's shift."""
    settings = {"logit_mean": 0.3, "logit_std": 0.7, "mode_scale": 1.29}
    result: dict[str, object] = {
        f"density/{name}": compute_density_for_timestep_sampling(
            name, 2048, generator=torch.Generator().manual_seed(0), **settings
        )
        for name in ("logit_normal", "mode")
    }
    # The function alone, at random numbers that are recorded.
    u = torch.rand(16, generator=torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    result["mode/u"] = u
    result["mode/t"] = compute_density_for_timestep_sampling("mode", 16, generator=again, mode_scale=1.29)
    result["flux/tokens"] = tokens = [64, 256, 1024, 4096, 6000]
    result["flux/mu"] = [calculate_shift(count) for count in tokens]
    return result


def weights() -> dict[str, object]:
    """diffusers: SNR and min-SNR as its text-to-image example has it, and SD3's weights."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    index = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, index)
    least = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    sigma = torch.linspace(0.01, 0.99, 21)
    return {
        "snr/index": index,
        "snr/snr": snr,
        "snr/min_snr_eps": least / snr,
        "snr/min_snr_v": least / (snr + 1.0),
        "sd3/sigma": sigma,
        "sd3/sigma_sqrt": compute_loss_weighting_for_sd3("sigma_sqrt", sigma),
        "sd3/cosmap": compute_loss_weighting_for_sd3("cosmap", sigma),
    }


def edm() -> dict[str, object]:
    """k-diffusion: the losses of its preconditioned denoiser, whose network is `tanh(x) / (1 + sigma)`."""
    generator = torch.Generator().manual_seed(2)
    x0, eps = (torch.randn(4, 3, 4, 4, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    result: dict[str, object] = {"edm/x0": x0, "edm/eps": eps, "edm/sigma": sigma}

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            self.output = torch.tanh(x) / (1.0 + sigma[:, None, None, None])
            return self.output

    for name in ("karras", "snr", "soft-min-snr"):
        net = Net()
        result[f"edm/loss/{name}"] = Denoiser(net, sigma_data=0.5, weighting=name).loss(x0, eps, sigma)
        result["edm/output"] = net.output
    return result


def averages() -> dict[str, object]:
    """diffusers and ema_pytorch: decays, exponents, and the weights of post-hoc reconstruction."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    step = np.array([1, 2, 10, 100, 1000, 10_000, 1_000_000])  # diffusers counts updates from one
    plain = EMAModel(parameters, decay=0.9999)
    power = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=2.0, power=0.75)
    sigma_rel = np.array([0.01, 0.05, 0.1, 0.15, 0.25])
    gamma = np.array([sigma_rel_to_gamma(value) for value in sigma_rel])
    betas = []
    for value in gamma:
        average = KarrasEMA(torch.nn.Linear(1, 1), gamma=value)
        for count in step:
            average.step = torch.tensor(count - 1)  # its beta looks one update ahead
            betas.append(average.beta)
    snapshots = torch.tensor([100.0, 200.0, 300.0] * 2), torch.tensor(gamma[[1, 2]]).repeat_interleave(3)
    targets = torch.tensor([300.0, 300.0, 200.0, 250.0]), torch.tensor(gamma[[3, 2, 1, 3]])
    return {
        "ema/step": step,
        "ema/warm": [plain.get_decay(int(count)) for count in step],
        "ema/inverse_power": [power.get_decay(int(count)) for count in step],
        "ema/sigma_rel": sigma_rel,
        "ema/gamma": gamma,
        "ema/beta": np.reshape(betas, (len(gamma), len(step))),
        "posthoc/steps": snapshots[0],
        "posthoc/gammas": snapshots[1],
        "posthoc/target_steps": targets[0],
        "posthoc/target_gammas": targets[1],
        "posthoc/weights": solve_weights(*snapshots, *targets),  # which do not sum to one
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    arrays = {**times(), **weights(), **edm(), **averages()}
    np.savez_compressed(HERE / "training_maths.npz", **{name: np.asarray(a) for name, a in arrays.items()})
