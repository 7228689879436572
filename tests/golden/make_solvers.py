"""Make the golden trajectories of the one-step solvers with diffusers, k-diffusion and flow_matching.

Writes `solvers.npz` next to this file. The arrays are named `LIBRARY/CASE/WHAT`; `estimate` stands in for a
network, and the tests have the same. Everything is computed in float64, so that what differs is not their
rounding: diffusers asks for float32 by name, and is given float64 in its place. In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 k-diffusion==0.1.1 flow_matching==1.0.10 torchdiffeq numpy
    python tests/golden/make_solvers.py
"""

import contextlib
import itertools
from pathlib import Path
from unittest import mock

import diffusers
import k_diffusion
import numpy as np
import torch
from flow_matching.path import scheduler as flow_schedules
from flow_matching.solver import ODESolver

HERE = Path(__file__).parent
MEAN, STD = 0.3, 0.5
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EDM_SIGMA_DATA = 0.5


NOISE = torch.randn(
    20, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)  # [step, draw, …]
START = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def estimate(x, alpha, sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps in x, `alpha x0 + sigma eps = x`: of Gaussian data, and something that is not linear."""
    centred = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    bend = 0.1 * torch.tanh(2.0 * x / (alpha**2 + sigma**2) ** 0.5)
    return MEAN + alpha * STD**2 * centred - sigma * bend, sigma * centred + alpha * bend


@contextlib.contextmanager
def double():
    """float64, also where float32 is asked for."""
    usual = torch.get_default_dtype()
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(np, "float32", np.float64):
        torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(usual)


def drawing(scheduler, step: int):
    """What the scheduler draws in this step is given to it."""
    module = type(scheduler).__module__
    return mock.patch(f"{module}.randn_tensor", mock.Mock(return_value=NOISE[step, 0]), create=True)


def discrete(scheduler, num_steps: int, *, jumps: bool = False, **options) -> dict[str, torch.Tensor]:
    """A scheduler of x at its own scale (DDPM, DDIM, LCM)."""
    scheduler.set_timesteps(num_steps)
    x, prediction, path = START, scheduler.config.prediction_type, []
    result = {"start": x, "timesteps": scheduler.timesteps}
    for number, timestep in enumerate(scheduler.timesteps):
        signal = scheduler.alphas_cumprod[timestep]
        alpha, sigma = signal**0.5, (1.0 - signal) ** 0.5
        x0, eps = estimate(x, alpha, sigma)
        output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction]
        with drawing(scheduler, number):
            x = scheduler.step(output, timestep, x, **options).prev_sample
        path.append(x)
    if jumps:  # where it lands is not where it goes on from
        result["lands"] = scheduler.timesteps - scheduler.config.num_train_timesteps // num_steps
    return result | {"path": torch.stack(path)}


def scaled(scheduler, num_steps: int) -> dict[str, torch.Tensor]:
    """A scheduler of `x / alpha` (Euler, Heun, DPM2), whose x is recorded where alpha^2 + sigma^2 = 1."""
    scheduler.set_timesteps(num_steps)
    x = START
    y = x * (1.0 + scheduler.sigmas[0] ** 2) ** 0.5
    levels, path = [scheduler.sigmas[0]], []
    for number, timestep in enumerate(scheduler.timesteps):
        alpha = scheduler.scale_model_input(torch.ones_like(y), timestep)
        sigma = (1.0 - alpha**2) ** 0.5
        x0, eps = estimate(alpha * y, alpha, sigma)
        output = alpha * eps - sigma * x0 if scheduler.config.prediction_type == "v_prediction" else eps
        with drawing(scheduler, len(path)):
            y = scheduler.step(output, timestep, y).prev_sample
        if getattr(scheduler, "state_in_first_order", True) or number == len(scheduler.timesteps) - 1:
            levels.append(scheduler.sigmas[scheduler.step_index])
            path.append(y / (1.0 + levels[-1] ** 2) ** 0.5)
    return {"start": x, "path": torch.stack(path), "levels": torch.stack(levels)}


def raw(scheduler, **settings) -> dict[str, torch.Tensor]:
    """A scheduler whose x is recorded as it is: EDM's process, flows, consistency models."""
    flow = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    consistency = isinstance(scheduler, diffusers.CMStochasticIterativeScheduler)
    scheduler.set_timesteps(**settings)
    start = x = START * scheduler.sigmas[0]
    path = []
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[number]
        alpha = 1.0 - sigma if flow else torch.ones_like(sigma)
        x0, eps = estimate(x, alpha, sigma)
        if flow:
            output = eps - x0
        elif consistency:
            scheduler.scale_model_input(x, timestep)
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
            output = (x0 - c_skip * x) / c_out
        else:
            # Its "epsilon" is EDM's F.
            scheduler.scale_model_input(x, timestep)
            size = (sigma**2 + EDM_SIGMA_DATA**2) ** 0.5
            output = (x0 - (EDM_SIGMA_DATA / size) ** 2 * x) * size / (sigma * EDM_SIGMA_DATA)
        with drawing(scheduler, number):
            x = scheduler.step(output, timestep, x).prev_sample
        path.append(x)
    return {"start": start, "path": torch.stack(path), "levels": scheduler.sigmas}


def from_diffusers() -> dict[str, dict[str, torch.Tensor]]:
    made = {}
    ddim = {"clip_sample": False, **SD}
    for eta, to_one in itertools.product((0.0, 0.5, 1.0), (True, False)):
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=to_one, steps_offset=1, **ddim)
        made[f"ddim-leading-eta{eta}-one{to_one}"] = discrete(scheduler, 10, eta=eta)
    made["ddim-trailing"] = discrete(diffusers.DDIMScheduler(timestep_spacing="trailing", **ddim), 10)
    made["ddim-zero-snr"] = discrete(
        diffusers.DDIMScheduler(
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            **ddim,
        ),
        10,
        eta=0.5,
    )
    for spacing, count in (("linspace", 10), ("trailing", 7)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, **ddim)
        made[f"ddim-jumps-{spacing}"] = discrete(scheduler, count, jumps=True)
    thresholds = {
        "clip": {"clip_sample": True},
        "dynamic": {
            "clip_sample": False,
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 1.2,
        },
    }
    for name, threshold in thresholds.items():
        scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", **threshold)
        made[f"ddim-{name}"] = discrete(scheduler, 10, use_clipped_model_output=True)
        scheduler = diffusers.DDPMScheduler(prediction_type="sample", **threshold)
        made[f"ddpm-{name}"] = discrete(scheduler, 10)
    for variance, prediction in (
        ("fixed_small", "epsilon"),
        ("fixed_small", "sample"),
        ("fixed_small", "v_prediction"),
        ("fixed_large", "epsilon"),
    ):
        scheduler = diffusers.DDPMScheduler(
            variance_type=variance, prediction_type=prediction, clip_sample=False
        )
        made[f"ddpm-{variance}-{prediction}"] = discrete(scheduler, 10)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False
    )
    made["ddpm-cosine-trailing"] = discrete(scheduler, 10)
    scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace", clip_sample=False)
    made["ddpm-linspace"] = discrete(scheduler, 10)  # whose spacing is the whole number 111
    made["ddpm-linspace-rounded"] = discrete(scheduler, 8)
    scheduler = diffusers.DDPMScheduler(
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
    )
    made["ddpm-zero-snr"] = discrete(scheduler, 7)
    for count in (1, 6):
        made[f"lcm-{count}"] = discrete(diffusers.LCMScheduler(**SD), count)
    made["lcm-v"] = discrete(
        diffusers.LCMScheduler(prediction_type="v_prediction", timestep_scaling=0.001, **SD), 8
    )

    kinds = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "dpm2": diffusers.KDPM2DiscreteScheduler,
        "dpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    }
    for name, kind in kinds.items():
        for spacing in ("linspace", "leading", "trailing"):
            scheduler = kind(timestep_spacing=spacing, steps_offset=int(spacing == "leading"), **SD)
            made[f"{name}-{spacing}"] = scaled(scheduler, 10)
        if name != "euler_ancestral":
            made[f"{name}-karras"] = scaled(kind(use_karras_sigmas=True, **SD), 10)
            made[f"{name}-exponential"] = scaled(kind(use_exponential_sigmas=True, **SD), 10)
    for name in ("euler", "dpm2_ancestral"):
        made[f"{name}-interpolated"] = scaled(kinds[name](prediction_type="v_prediction"), 7)

    for kind in ("karras", "exponential"):
        scheduler = diffusers.EDMEulerScheduler(sigma_schedule=kind)
        made[f"edm_euler-{kind}"] = raw(scheduler, num_inference_steps=10)
    for shift, count in ((1.0, 10), (3.0, 10), (5.0, 7)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        made[f"flow-shift{shift:g}-{count}"] = raw(scheduler, num_inference_steps=count)
    for shift in (1.0, 3.0):  # as the pipelines of FLUX call it
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        made[f"flow-sigmas-shift{shift:g}"] = raw(scheduler, sigmas=np.linspace(1.0, 1 / 8, 8))
    for mu in (0.5, 1.15):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        made[f"flow-mu{mu:g}"] = raw(scheduler, sigmas=np.linspace(1.0, 1 / 8, 8), mu=mu)
    settings = {"onestep": [0], "multistep": [30, 20, 9, 0]}
    for name, timesteps in settings.items():
        made[f"cm-{name}"] = raw(diffusers.CMStochasticIterativeScheduler(), timesteps=timesteps)

    for name, settings in {
        "linear": {},
        "linear-100": {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        "scaled_linear": SD,
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
        "linear-zero-snr": {"rescale_betas_zero_snr": True},
        "scaled_linear-zero-snr": {"rescale_betas_zero_snr": True, **SD},
        "cosine-zero-snr": {"rescale_betas_zero_snr": True, "beta_schedule": "squaredcos_cap_v2"},
    }.items():
        made[f"betas-{name}"] = {"signal": diffusers.DDIMScheduler(**settings).alphas_cumprod}
    return made


def from_k_diffusion() -> dict[str, dict[str, torch.Tensor]]:
    sampling = k_diffusion.sampling
    sigmas = sampling.get_sigmas_karras(10, 0.02, 10.0)
    start = START * sigmas[0]

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return estimate(x, torch.ones(()), sigma[:, None, None])[0]

    def run(sampler: str, draws: int = 0, **settings) -> dict[str, torch.Tensor]:
        """A sampler on Karras' sigmas; `draws` is how often it adds noise in each step but the last."""
        path, numbers = [], itertools.count()

        def draw(*args):
            step, number = divmod(next(numbers), max(draws, 1))
            return NOISE[step, number]

        if draws:
            settings["noise_sampler"] = draw
        with mock.patch.object(torch, "randn_like", draw):  # churn, at the beginning of every step
            final = getattr(sampling, f"sample_{sampler}")(
                model, start, sigmas, disable=True, callback=lambda info: path.append(info["x"]), **settings
            )
        if "s_churn" in settings:  # x is reported with the noise in it
            return {"start": start, "path": final[None]}
        return {"start": start, "path": torch.stack([*path[1:], final])}

    made = {name: run(name) for name in ("euler", "heun", "dpm_2")}
    for eta, s_noise in ((1.0, 1.0), (0.5, 1.05)):
        made[f"euler_ancestral-{eta}"] = run("euler_ancestral", 1, eta=eta)
        for name in ("dpm_2_ancestral", "dpmpp_2s_ancestral"):
            made[f"{name}-{eta}"] = run(name, 1, eta=eta, s_noise=s_noise)
        made[f"dpmpp_sde-{eta}"] = run("dpmpp_sde", 2, eta=eta, s_noise=s_noise)
    churn = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 8.0, "s_noise": 1.003}
    for name in ("euler", "heun"):
        made[f"{name}-churned"] = run(name, **churn)
    made["heun-churned-most"] = run("heun", s_churn=80.0)
    for count in (9, 10, 11):
        final = sampling.sample_dpm_fast(model, start, 0.02, 10.0, count, disable=True)
        made[f"dpm_fast-{count}"] = {"start": start, "path": final[None]}
    for name, levels in {
        "karras": sampling.get_sigmas_karras(10, 0.002, 80.0),
        "karras-rho3": sampling.get_sigmas_karras(7, 0.01, 50.0, rho=3.0),
        "karras-rho1": sampling.get_sigmas_karras(7, 0.01, 50.0, rho=1.0),
        "exponential": sampling.get_sigmas_exponential(10, 0.002, 80.0),
        "vp": sampling.get_sigmas_vp(10),
    }.items():
        made[f"grids-{name}"] = {"sigmas": levels}
    return made


def from_flow_matching() -> dict[str, dict[str, torch.Tensor]]:
    """Meta's library, where t = 1 is the data; everything is recorded by the time 1 - t."""
    t = torch.linspace(0.02, 0.98, 25)
    made = {}
    for name, levels in {
        "condot": flow_schedules.CondOTScheduler(),
        "vp": flow_schedules.VPScheduler(),
        "linear_vp": flow_schedules.LinearVPScheduler(),
        "cosine": flow_schedules.CosineScheduler(),
        "polynomial2": flow_schedules.PolynomialConvexScheduler(2),
        "polynomial3": flow_schedules.PolynomialConvexScheduler(3),
    }.items():
        out = levels(1.0 - t)
        ones = torch.ones_like(t)
        made[f"path-{name}"] = {
            "t": t,
            "alpha": out.alpha_t,
            "sigma": out.sigma_t,
            "d_alpha": -out.d_alpha_t * ones,
            "d_sigma": -out.d_sigma_t * ones,
        }
    condot, cosine = flow_schedules.CondOTScheduler(), flow_schedules.CosineScheduler()
    cases = {f"condot-{method}": (condot, method) for method in ("euler", "midpoint", "heun3", "rk4")}
    cases |= {f"cosine-{method}": (cosine, method) for method in ("midpoint", "rk4")}
    for name, (levels, method) in cases.items():

        def velocity(x, t, levels=levels):
            out = levels(t)
            x0, eps = estimate(x, out.alpha_t, out.sigma_t)
            return out.d_alpha_t * x0 + out.d_sigma_t * eps

        path = ODESolver(velocity).sample(
            x_init=START,
            step_size=None,
            method=method,
            time_grid=torch.linspace(0.0, 1.0, 9),
            return_intermediates=True,
        )
        made[f"ode-{name}"] = {"start": path[0], "path": path[1:]}
    return made


if __name__ == "__main__":
    arrays = {"noise": NOISE.numpy()}
    with double(), torch.no_grad():
        for library in (from_diffusers, from_k_diffusion, from_flow_matching):
            for case, values in library().items():
                for what, value in values.items():
                    arrays[f"{library.__name__.removeprefix('from_')}/{case}/{what}"] = np.asarray(value)
    np.savez_compressed(HERE / "solvers.npz", **arrays)
