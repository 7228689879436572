"""Make the golden trajectories of the multistep solvers with diffusers and k-diffusion.

Writes `multistep.npz` next to this file. The arrays are named `LIBRARY/CASE/WHAT`; `eps_of` stands in for a
network. In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 k-diffusion==0.1.1 scipy numpy
    python tests/golden/make_multistep.py
"""

import itertools
from pathlib import Path

import k_diffusion
import numpy as np
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

HERE = Path(__file__).parent
MEAN, STD = 0.3, 0.5
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def eps_of(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noise in x for Gaussian data, and something that is not linear."""
    scale = (alpha**2 + sigma**2) ** 0.5
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) + 0.1 * torch.tanh(2.0 * x / scale)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


START, NOISE = normal(2, 3, 4, 4, seed=0), normal(10, 2, 3, 4, 4, seed=1)


def levels(scheduler, timestep) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma, where the scheduler is."""
    if isinstance(scheduler, PNDMScheduler):
        signal = scheduler.alphas_cumprod[timestep]
        return signal**0.5, (1.0 - signal) ** 0.5
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    ratio = scheduler.sigmas[scheduler.step_index]
    return 1.0 / (1.0 + ratio**2) ** 0.5, ratio / (1.0 + ratio**2) ** 0.5


def drive(scheduler, num_steps: int) -> dict[str, torch.Tensor]:
    """The end of a trajectory; x is always of the scale alpha^2 + sigma^2 = 1."""
    scheduler.set_timesteps(num_steps)
    scaled = isinstance(scheduler, LMSDiscreteScheduler)
    y = START * (1.0 + scheduler.sigmas[0] ** 2) ** 0.5 if scaled else START
    path = []
    for i, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = levels(scheduler, timestep)
        inner = scheduler.scale_model_input(y, timestep)
        output = eps_of(inner, alpha, sigma)
        if scheduler.config.prediction_type == "v_prediction":
            output = (output - sigma * inner) / alpha  # v = alpha eps - sigma x0
        extra = {}
        if scheduler.config.get("algorithm_type", "").startswith("sde"):
            extra["variance_noise"] = NOISE[i]
        y = scheduler.step(output, timestep, y, **extra).prev_sample
        if scaled:
            path.append(y / (1.0 + scheduler.sigmas[i + 1] ** 2) ** 0.5)
        else:
            path.append(y)
    return {"path": torch.stack(path[-5:]), "timesteps": scheduler.timesteps}


def diffusers() -> dict[str, torch.Tensor]:
    """diffusers: DPM-Solver++ (ODE and SDE), DPM-Solver, UniPC, DEIS, PNDM, LMS."""
    result = {}

    def add(name: str, scheduler, num_steps: int) -> None:
        result.update({f"{name}/{num_steps}/{what}": v for what, v in drive(scheduler, num_steps).items()})

    counts = itertools.cycle((5, 10, 20))
    for order, variant in [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]:
        settings = {"solver_order": order, "solver_type": variant, **BETAS}
        for prediction, spacing in itertools.product(
            ("epsilon", "v_prediction"), ("linspace", "leading", "trailing")
        ):
            scheduler = DPMSolverMultistepScheduler(
                timestep_spacing=spacing, prediction_type=prediction, **settings
            )
            # Over the settings each spacing and each prediction meets each number of steps.
            add(f"dpmpp/{order}-{variant}/{prediction}-{spacing}", scheduler, next(counts))
        next(counts)
        if order == 2:  # where the coefficient of the second difference does not vanish with h
            scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **settings)
            add(f"sde/{order}-{variant}/epsilon-linspace", scheduler, 10)
        if order > 1:
            scheduler = DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **settings
            )
            add(f"dpm/{order}-{variant}/epsilon-linspace", scheduler, 10)
        if order == 3:
            scheduler = DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", **settings)
            add(f"dpmpp-min/{order}-{variant}/epsilon-linspace", scheduler, 20)
    for order, (variant, corrector) in itertools.product(
        (1, 2, 3), (("bh1", True), ("bh2", True), ("bh2", False))
    ):
        disabled = [] if corrector else list(range(20))
        settings = {"solver_order": order, "solver_type": variant, "disable_corrector": disabled, **BETAS}
        # Not to sigma = 0, where bh1 gives NaN.
        scheduler = UniPCMultistepScheduler(final_sigmas_type="sigma_min", **settings)
        add(f"unipc-min/{order}-{variant}-{corrector}/epsilon-linspace", scheduler, next(counts))
    for prediction, spacing in [("epsilon", "trailing"), ("v_prediction", "leading")]:
        scheduler = UniPCMultistepScheduler(timestep_spacing=spacing, prediction_type=prediction, **BETAS)
        add(f"unipc/2-bh2-True/{prediction}-{spacing}", scheduler, 10)
    scheduler = UniPCMultistepScheduler(
        solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min", **BETAS
    )
    add("unipc-full/3-bh2-True/epsilon-linspace", scheduler, 10)
    for order, num_steps in itertools.product((2, 3), (5, 10, 20)):
        add(f"deis/{order}/epsilon-linspace", DEISMultistepScheduler(solver_order=order, **BETAS), num_steps)
    for num_steps in (5, 10, 20):
        settings = {"timestep_spacing": "leading", "steps_offset": 1, **BETAS}
        add("plms/heun/epsilon-leading", PNDMScheduler(skip_prk_steps=True, **settings), num_steps)
        add("plms/runge_kutta/epsilon-leading", PNDMScheduler(skip_prk_steps=False, **settings), num_steps)
    for num_steps in (5, 10, 20):
        add("lms/4/epsilon-trailing", LMSDiscreteScheduler(timestep_spacing="trailing", **BETAS), num_steps)
    add("lms/4/v_prediction-linspace", LMSDiscreteScheduler(prediction_type="v_prediction", **BETAS), 10)
    return result


def k_diffusion_samplers() -> dict[str, torch.Tensor]:
    """k-diffusion: the multistep samplers on Karras's grid from 10 to 0.02, at the scale of alpha = 1."""
    sigmas = k_diffusion.sampling.get_sigmas_karras(10, 0.02, 10.0)
    result = {"sigmas": sigmas}

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma[:, None, None, None]
        return x - sigma * eps_of(x, torch.ones_like(sigma), sigma)

    def run(name: str, what: str, *, stochastic: bool, **settings) -> None:
        numbers = itertools.count()
        if stochastic:
            settings["noise_sampler"] = lambda sigma, sigma_next: NOISE[next(numbers)]
        sampler = getattr(k_diffusion.sampling, f"sample_{what}")
        result[name] = sampler(model, START * sigmas[0], sigmas, disable=True, **settings)

    for order in (2, 3, 4):
        run(f"lms-{order}", "lms", stochastic=False, order=order)
    run("dpmpp_2m", "dpmpp_2m", stochastic=False)
    for variant, eta in (("midpoint", 1.0), ("heun", 0.5)):
        run(f"dpmpp_2m_sde-{variant}-{eta}", "dpmpp_2m_sde", stochastic=True, solver_type=variant, eta=eta)
    for eta in (0.0, 1.0):
        run(f"dpmpp_3m_sde-heun-{eta}", "dpmpp_3m_sde", stochastic=True, eta=eta)
    run("dpmpp_3m_sde-inflated", "dpmpp_3m_sde", stochastic=True, s_noise=1.1)
    return result


if __name__ == "__main__":
    made = {"diffusers": diffusers(), "kdiffusion": k_diffusion_samplers()}
    arrays = {f"{library}/{name}": np.asarray(v) for library, d in made.items() for name, v in d.items()}
    arrays |= {"start": START.numpy(), "noise": NOISE.numpy()}
    np.savez_compressed(HERE / "multistep.npz", **arrays)
