"""Schedules, time grids and one-step solvers, by the names of the tables, against the original libraries.

`solvers.npz` was computed in float64 (see `make_solvers.py`), so that agreement is to many digits or there is none.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.grids import TIME_GRIDS
from diffjax.diffusion.inputs import INPUTS
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import SCHEDULES, Coeffs, expand
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.solvers.base import noise_to_signal
from diffjax.diffusion.thresholding import THRESHOLDS, thresholded

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "solvers.npz")
MEAN, STD = 0.3, 0.5
Named = tuple[str, dict[str, Any]]

SD: Named = ("ddpm", {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
SD_ZERO_SNR: Named = ("ddpm", SD[1] | {"zero_terminal_snr": True})
LINEAR: Named = ("ddpm", {})
COSINE: Named = ("ddpm", {"betas": "cosine"})
# With room above sigma_max for the noise that is added before the first step.
EDM: Named = ("edm", {"sigma_max": 200.0})
FLOW: Named = ("linear_flow", {"sigma_min": 0.0})
NONE: Named = ("none", {})
DYNAMIC: Named = ("dynamic", {"percentile": 0.9, "max_value": 1.2})


class Case(NamedTuple):
    """Settings, each a name in its table and what that is called with."""

    schedule: Named
    grid: Named
    num_steps: int
    solver: Named
    prediction: str = "eps"
    threshold: Named = NONE


def discrete_cases():
    """diffusers' schedulers of x at its own scale."""
    for eta in (0.0, 0.5, 1.0):
        for one in (True, False):  # set_alpha_to_one
            grid = ("leading", {"offset": 1, "last": 0 if one else 1})
            yield f"ddim-leading-eta{eta}-one{one}", Case(SD, grid, 10, ("ddim", {"eta": eta}))
    trailing, leading = ("trailing", {}), ("leading", {})
    yield "ddim-trailing", Case(LINEAR, trailing, 20, ("ddim", {}))
    yield "ddim-zero-snr", Case(SD_ZERO_SNR, trailing, 10, ("ddim", {"eta": 0.5}), "v")
    for name, threshold in {"clip": ("static", {}), "dynamic": DYNAMIC}.items():
        # With use_clipped_model_output: without it, diffusers keeps the eps of the x0 that was thrown away.
        yield f"ddim-{name}", Case(COSINE, leading, 10, ("ddim", {}), "eps", threshold)
        yield f"ddpm-{name}", Case(LINEAR, leading, 8, ("ddpm", {}), "x0", threshold)
    for variance in ("small", "large"):
        for theirs, ours in {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}.items():
            solver = ("ddpm", {"variance": variance})
            yield f"ddpm-fixed_{variance}-{theirs}", Case(LINEAR, leading, 20, solver, ours)
    yield "ddpm-cosine-trailing", Case(COSINE, trailing, 10, ("ddpm", {}))
    yield "ddpm-linspace", Case(LINEAR, ("linspace", {}), 10, ("ddpm", {}))
    # Where the spacing is no whole number, diffusers rounds.
    rounded = [*(np.round(np.linspace(999, 0, 7)) + 1) / 1000, 0.0]
    yield "ddpm-linspace-rounded", Case(LINEAR, ("explicit", {"times": rounded}), 7, ("ddpm", {}))
    zero_snr = ("ddpm", {"zero_terminal_snr": True})
    yield "ddpm-zero-snr", Case(zero_snr, trailing, 7, ("ddpm", {}), "v")
    for num_steps in (1, 4, 6):
        yield f"lcm-{num_steps}", Case(SD, lcm_grid(num_steps), num_steps, ("lcm", {}))
    yield "lcm-v", Case(SD, lcm_grid(8), 8, ("lcm", {"timestep_scale": 5.0}), "v")


def lcm_grid(num_steps: int) -> Named:
    """Of every 20th step, counted from the last, as equally many as can be."""
    distilled = np.arange(1000, 0, -20)
    picked = distilled[np.floor(np.linspace(0, 50, num_steps, endpoint=False)).astype(int)]
    return "explicit", {"times": [*picked / 1000, 0.0]}


def scaled_cases():
    """diffusers' schedulers of x / alpha: Runge-Kutta steps in sigma."""
    solvers = {name: (name, {"variable": "sigma"}) for name in ("euler", "heun")}
    solvers |= {name: (name, {}) for name in ("euler_ancestral", "dpm2", "dpm2_ancestral")}
    for name, solver in solvers.items():
        yield f"{name}-linspace", Case(SD, ("linspace", {}), 10, solver)
        # Between the steps of the process, diffusers interpolates sigma, not alpha^2.
        levels = GOLDEN[f"diffusers/{name}-interpolated/levels"]
        yield f"{name}-interpolated", Case(LINEAR, ("explicit_sigmas", {"sigmas": levels}), 7, solver, "v")
        yield f"{name}-leading", Case(SD, ("leading", {"offset": 1}), 8, solver)
        yield f"{name}-trailing", Case(SD, ("trailing", {}), 6, solver)
        if name != "euler_ancestral":
            low, high = np.sqrt(1.0 / GOLDEN["diffusers/betas-scaled_linear/signal"][[0, -1]] - 1.0)
            for grid in ("karras", "exponential"):
                ends = {"sigma_min": low, "sigma_max": high}
                yield f"{name}-{grid}", Case(SD, (grid, ends), 9, solver)
    return


def raw_cases():
    """diffusers' schedulers for EDM and flows."""
    for grid in ("karras", "exponential"):
        for num_steps in (6, 10):
            yield f"edm_euler-{grid}-{num_steps}", Case(EDM, (grid, {}), num_steps, ("euler", {}), "edm")
    for shift, num_steps in ((1.0, 10), (1.0, 7), (3.0, 10), (5.0, 7)):
        # It shifts what it has shifted: equally spaced to the shifted 1 / 1000, and then moved by the schedule.
        # Where the path is straight, DDIM is Euler's method in its own time, whatever the schedule's.
        grid = ("uniform", {"last_step": shift * 0.001 / (1.0 + (shift - 1.0) * 0.001)})
        schedule = ("linear_flow", {"sigma_min": 0.0, "shift": shift})
        yield f"flow-shift{shift:g}-{num_steps}", Case(schedule, grid, num_steps, ("ddim", {}), "velocity")
    for name, shift in {"sigmas-shift1": 1.0, "sigmas-shift3": 3.0, "mu0.5": np.exp(0.5), "mu1.15": np.exp(1.15)}.items():
        yield f"flow-{name}", Case(FLOW, ("shifted", {"shift": shift}), 8, ("euler", {}), "velocity")
    for name in ("onestep", "multistep", "many"):
        sigmas = GOLDEN[f"diffusers/cm-{name}/levels"]
        grid = ("explicit_sigmas", {"sigmas": sigmas})
        solver = ("consistency", {"sigma_min": 0.002})
        yield f"cm-{name}", Case(EDM, grid, len(sigmas) - 1, solver, "edm", ("static", {}))


def k_diffusion_cases():
    karras = ("karras", {"sigma_min": 0.02, "sigma_max": 10.0})
    for theirs, ours in {"euler": "euler", "heun": "heun", "dpm_2": "dpm2"}.items():
        yield theirs, Case(EDM, karras, 10, (ours, {}), "edm")
    for theirs, ours in {"dpm_2_ancestral": "dpm2_ancestral"}.items() | {
        (name, name) for name in ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    }:
        for eta in (1.0, 0.5):
            yield f"{theirs}-{eta}", Case(EDM, karras, 10, (ours, {"eta": eta}), "edm")
        if ours != "euler_ancestral":
            yield f"{theirs}-inflated", Case(EDM, karras, 10, (ours, {"inflate": 1.05}), "edm")
    churn = {"churn": 3.0, "sigma_min": 0.05, "sigma_max": 8.0, "inflate": 1.003}
    for method in ("euler", "heun"):
        solver = ("edm", churn | {"method": method})
        yield f"{method}-churned", Case(EDM, karras, 10, solver, "edm")
    most = {"churn": 80.0, "sigma_min": 0.0, "sigma_max": np.inf, "inflate": 1.0}
    yield "heun-churned-most", Case(EDM, karras, 10, ("edm", most), "edm")
    for evaluations in (9, 10, 11):
        grid = ("exponential", karras[1] | {"to_zero": False})
        solver = ("dpm_fast", {"remainder": evaluations % 3})
        yield f"dpm_fast-{evaluations}", Case(EDM, grid, evaluations // 3 + 1, solver, "edm")


def flow_matching_cases():
    for theirs, schedule in {"condot": FLOW, "cosine": ("trigonometric", {})}.items():
        for method in ("euler", "midpoint", "heun3", "rk4"):
            solver = ("rk4_38" if method == "rk4" else method, {"last": "same"})
            for num_steps in (4, 16):
                case = Case(schedule, ("uniform", {}), num_steps, solver, "velocity")
                yield f"ode-{theirs}-{method}-{num_steps}", case


CASES = {
    f"{library}/{name}": case
    for library, makers in {
        "diffusers": (discrete_cases, scaled_cases, raw_cases),
        "k_diffusion": (k_diffusion_cases,),
        "flow_matching": (flow_matching_cases,),
    }.items()
    for make in makers
    for name, case in make()
}


def estimate(x: jax.Array, coeffs: Coeffs) -> Estimate:
    """Stands in for a network: what is right for Gaussian data, and something that is not linear."""
    alpha, sigma, *_ = expand(coeffs, x)
    centred = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    bend = 0.1 * jnp.tanh(2.0 * x / jnp.hypot(alpha, sigma))
    return Estimate(MEAN + alpha * STD**2 * centred - sigma * bend, sigma * centred + alpha * bend)


def trajectory(name: str, case: Case, monkeypatch, *, by_network: bool) -> jax.Array:
    schedule, solver = SCHEDULES[case.schedule[0]](**case.schedule[1]), SOLVERS[case.solver[0]](**case.solver[1])
    times = TIME_GRIDS[case.grid[0]](**case.grid[1])(schedule, case.num_steps)
    prediction = PREDICTIONS[case.prediction]()

    def net(x: jax.Array, t: jax.Array) -> jax.Array:
        coeffs = schedule(t)
        return combine(prediction(expand(coeffs, x)), estimate(x, coeffs))

    def exactly(x: jax.Array, t: jax.Array) -> Estimate:
        return estimate(x, schedule(t))

    denoise = make_denoiser(net, schedule, prediction, INPUTS["time"](scale=1.0)) if by_network else exactly
    if case.threshold != NONE:
        denoise = thresholded(denoise, schedule, THRESHOLDS[case.threshold[0]](**case.threshold[1]))
    start = jnp.asarray(GOLDEN[f"{name}/start"], jnp.result_type(float))
    keys = jax.random.split(jax.random.key(0), len(start))
    recorded = jnp.asarray(GOLDEN["noise"], start.dtype)
    numbers = jnp.arange(1, len(times))
    of_steps = jax.random.key_data(jax.vmap(lambda number: jax.random.fold_in(keys[0], number))(numbers))

    def of_this_step(keys: jax.Array, x: jax.Array, draw: int = 0) -> jax.Array:
        """The noise that the other library was given, found by the key that this step has."""
        return recorded[jnp.argmax((of_steps == jax.random.key_data(keys[0])).all(axis=-1)), draw]

    monkeypatch.setattr(noise, "normal_like", of_this_step)
    run = jax.jit(
        lambda start: sample(
            denoise, schedule, solver, keys=keys, shape=start.shape[1:], times=times, start=start, trajectory=True
        )
    )
    path = run(start)
    assert len(path) == case.num_steps + 1
    return path[-len(GOLDEN[f"{name}/path"]) :]


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_the_original(name, monkeypatch):
    with jax.enable_x64(True):
        path = trajectory(name, CASES[name], monkeypatch, by_network=False)
        e = np.abs(path - GOLDEN[f"{name}/path"]).max(axis=(1, 2, 3))/np.abs(GOLDEN[f"{name}/path"]).max(axis=(1,2,3))
        print("ERR64", name, e.max(), e[-1])


@pytest.mark.parametrize("name", CASES)
def test_single(name, monkeypatch):
    path = trajectory(name, CASES[name], monkeypatch, by_network=True)
    e = np.abs(path - GOLDEN[f"{name}/path"]).max(axis=(1, 2, 3))/np.abs(GOLDEN[f"{name}/path"]).max(axis=(1,2,3))
    print("ERR32", name, e.max(), e[-1])
