"""Make the golden values of the diffusion mathematics with four PyTorch libraries.

Writes `diffusion.npz` next to this file. The arrays are named `LIBRARY/CASE/WHAT`.

In an environment of its own:

    pip install torch==2.13.0 torchvision diffusers==0.42.1 flow_matching==1.0.10
    pip install imagen-pytorch==2.1.0 k-diffusion==0.1.1 numpy
    python tests/golden/make_diffusion.py
"""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import k_diffusion
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler
from imagen_pytorch.imagen_pytorch import GaussianDiffusionContinuousTimes, Imagen

HERE = Path(__file__).parent
MEAN, STD = 0.3, 0.5  # of the Gaussian data whose exact denoiser stands in for a network


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def posterior_mean(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x0 | x] of the Gaussian data."""
    return (MEAN * sigma**2 + STD**2 * alpha * x) / (sigma**2 + STD**2 * alpha**2)


def imagen() -> dict[str, torch.Tensor]:
    """imagen-pytorch: the cosine schedule, q(x_s | x_t, x0), conversions, dynamic thresholding."""
    process = GaussianDiffusionContinuousTimes(noise_schedule="cosine", timesteps=10)
    t = torch.linspace(0.05, 0.95, 10)
    s = (t - 0.1).clamp(min=0.0)
    x0, x, out = (normal(10, 2, 2, 3, seed=i) for i in range(3))
    mean, variance, _ = process.q_posterior(x0, x, t, t_next=s)
    _, logsnr, alpha, sigma = process.q_sample(x0, t, noise=x)
    images = normal(4, 6, 6, 3, seed=3) * torch.tensor([0.2, 1.0, 2.0, 6.0])[:, None, None, None]
    result = {
        "cosine/t": t,
        "cosine/s": s,
        "cosine/logsnr": logsnr,
        "cosine/alpha": alpha.reshape(-1),
        "cosine/sigma": sigma.reshape(-1),
        "cosine/x0": x0,
        "cosine/x": x,
        "cosine/posterior_mean": mean,
        "cosine/posterior_variance": variance.reshape(-1),
        "cosine/output": out,
        "cosine/x0_from_v": process.predict_start_from_v(x, t, out),
        "cosine/x0_from_eps": process.predict_start_from_noise(x, t, out),
        "dynamic/images": images,
    }
    for percentile in (0.9, 0.995):
        settings = SimpleNamespace(dynamic_thresholding_percentile=percentile, is_video=False)
        _, result[f"dynamic/{percentile}"] = Imagen.p_mean_variance(
            settings,
            unet=None,
            x=images,
            t=t[:4],
            t_next=s[:4],
            noise_scheduler=process,
            model_output=images.clone(),
            pred_objective="x_start",
        )
    return result


def kdiffusion() -> dict[str, torch.Tensor]:
    """k-diffusion: EDM's preconditioning and loss, Euler and ancestral Euler on Karras' sigmas."""
    sigma_data = 0.5
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    x0, eps = normal(4, 3, 4, seed=0) * sigma_data, normal(4, 3, 4, seed=1)
    denoiser = k_diffusion.layers.Denoiser(Inner(), sigma_data, weighting="karras")
    x = x0 + eps * sigma[:, None, None]
    c_skip, c_out, c_in = denoiser.get_scalings(sigma)
    result = {
        "edm/sigma": sigma,
        "edm/x0": x0,
        "edm/eps": eps,
        "edm/c_in": c_in,
        "edm/output": Inner()(x * c_in[:, None, None], denoiser.sigma_data),
        "edm/denoised": denoiser(x, sigma),
        "edm/loss": denoiser.loss(x0, eps, sigma),
    }
    sigmas = k_diffusion.sampling.get_sigmas_karras(10, 0.002, 80.0)
    start = normal(2, 3, 4, seed=2) * 80.0
    noises = list(normal(10, 2, 3, 4, seed=3))
    drawn = iter(noises)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma[:, None, None]
        return posterior_mean(x, torch.ones_like(sigma), sigma)

    result |= {
        "euler/sigmas": sigmas,
        "euler/start": start,
        "euler/noise": torch.stack(noises),
        "euler/final": k_diffusion.sampling.sample_euler(model, start, sigmas, disable=True),
        "euler/final_ancestral": k_diffusion.sampling.sample_euler_ancestral(
            model, start, sigmas, disable=True, noise_sampler=lambda sigma, sigma_next: next(drawn)
        ),
    }
    assert c_skip.shape == c_out.shape
    return result


class Inner(torch.nn.Module):
    """Stands in for a network; any function does."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.tanh(x) + 0.3 * x.roll(1, dims=-1)


def flow_matching() -> dict[str, torch.Tensor]:
    """Meta's flow_matching: paths, velocities and conversions. There t = 1 is the data."""
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    noise, data = normal(6, 5, seed=0), normal(6, 5, seed=1)
    result = {"t": t, "noise": noise, "data": data}
    for name, scheduler in {"cosine": CosineScheduler(), "linear": CondOTScheduler()}.items():
        path = AffineProbPath(scheduler)
        sample = path.sample(noise, data, t)
        velocity = sample.dx_t
        wide = t[:, None].expand_as(velocity)
        levels = scheduler(t)
        result |= {
            f"{name}/alpha": levels.alpha_t,
            f"{name}/sigma": levels.sigma_t,
            f"{name}/d_alpha": levels.d_alpha_t * torch.ones_like(t),
            f"{name}/d_sigma": levels.d_sigma_t * torch.ones_like(t),
            f"{name}/x": sample.x_t,
            f"{name}/velocity": velocity,
            f"{name}/eps_from_velocity": path.velocity_to_epsilon(velocity, sample.x_t, wide),
            f"{name}/x0_from_velocity": path.velocity_to_target(velocity, sample.x_t, wide),
        }
    return result


def diffusers() -> dict[str, torch.Tensor]:
    """diffusers: whole trajectories, with the noise that was drawn and what the model said."""
    clipped = {"clip_sample": True, "timestep_spacing": "leading"}
    cases = {
        "ddim": (DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), 10),
        "ddim_eta1": (DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 10),
        "ddpm": (DDPMScheduler(**clipped), 20),
        "ddpm_large": (DDPMScheduler(variance_type="fixed_large", clip_sample=False), 20),
        "ddpm_dynamic": (
            DDPMScheduler(
                beta_schedule="squaredcos_cap_v2",
                thresholding=True,
                dynamic_thresholding_ratio=0.95,
                sample_max_value=1.5,
            ),
            10,
        ),
        "flow_shift3": (FlowMatchEulerDiscreteScheduler(shift=3.0), 10),
    }
    values = torch.tensor([0.0, 1.0, 250.5, 999.0])
    result = {
        "embedding/values": values,
        "embedding/sinusoidal": get_timestep_embedding(
            values, 64, flip_sin_to_cos=True, downscale_freq_shift=0
        ),
        "embedding/positions": get_2d_sincos_pos_embed(16, 3, base_size=3, output_type="pt"),
    }
    for name, (scheduler, steps) in cases.items():
        scheduler.set_timesteps(steps)
        if name == "flow_shift3":
            levels = torch.stack([1.0 - scheduler.sigmas, scheduler.sigmas], dim=1)
        else:
            indices = [int(t) for t in scheduler.timesteps]
            last = scheduler.final_alpha_cumprod if name.startswith("ddim") else torch.tensor(1.0)
            signal = torch.cat([scheduler.alphas_cumprod[indices], last.reshape(1)])
            levels = torch.stack([signal**0.5, (1.0 - signal) ** 0.5], dim=1)
        outputs, trajectory, noises = [], [], []
        x = start = normal(2, 3, 4, seed=0)

        def draw(shape, *, noises=noises, **kwargs):
            noises.append(normal(*shape, seed=100 + len(noises)))
            return noises[-1]

        module = type(scheduler).__module__
        for i, timestep in enumerate(scheduler.timesteps):
            alpha, sigma = levels[i]
            data = posterior_mean(x, alpha, sigma)
            noise = (x - alpha * data) / sigma
            outputs.append(noise - data if name == "flow_shift3" else noise)
            options = {"eta": 1.0} if name == "ddim_eta1" else {}
            with mock.patch(f"{module}.randn_tensor", draw):
                x = scheduler.step(outputs[-1], timestep, x, **options).prev_sample
            trajectory.append(x)
        result |= {
            f"{name}/levels": levels,
            f"{name}/start": start,
            f"{name}/outputs": torch.stack(outputs),
            f"{name}/trajectory": torch.stack(trajectory),
        }
        if noises:
            result[f"{name}/noise"] = torch.stack(noises)
    return result


if __name__ == "__main__":
    arrays = {}
    for library in (imagen, kdiffusion, flow_matching, diffusers):
        with torch.no_grad():
            made = library()
        arrays |= {f"{library.__name__}/{key}": value.numpy() for key, value in made.items()}
    np.savez_compressed(HERE / "diffusion.npz", **arrays)
