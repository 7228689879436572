"""Schedules, time grids and one-step solvers, by the names of the tables, against the original libraries.

`solvers.npz` was computed in float64 (see `make_solvers.py`), so what differs is this library's rounding.
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
from diffjax.diffusion.schedules import SCHEDULES, Coeffs, Schedule, expand
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
    yield "ddim-trailing", Case(SD, trailing, 10, ("ddim", {"eta": 0.0}))
    yield "ddim-zero-snr", Case(SD_ZERO_SNR, trailing, 10, ("ddim", {"eta": 0.5}), "v")
    for name, threshold in {"clip": ("static", {}), "dynamic": DYNAMIC}.items():
        # With use_clipped_model_output: without it, diffusers keeps the eps of the x0 that was thrown away.
        yield f"ddim-{name}", Case(COSINE, leading, 10, ("ddim", {}), "eps", threshold)
        yield f"ddpm-{name}", Case(LINEAR, leading, 10, ("ddpm", {}), "x0", threshold)
    for theirs, ours in {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}.items():
        yield f"ddpm-fixed_small-{theirs}", Case(LINEAR, leading, 10, ("ddpm", {}), ours)
    yield "ddpm-fixed_large-epsilon", Case(LINEAR, leading, 10, ("ddpm", {"variance": "large"}))
    yield "ddpm-cosine-trailing", Case(COSINE, trailing, 10, ("ddpm", {}))
    yield "ddpm-linspace", Case(LINEAR, ("linspace", {}), 10, ("ddpm", {}))
    # Where the spacing is no whole number, diffusers rounds.
    rounded = [*(np.round(np.linspace(999, 0, 8)) + 1) / 1000, 0.0]
    yield "ddpm-linspace-rounded", Case(LINEAR, ("explicit", {"times": rounded}), 8, ("ddpm", {}))
    zero_snr = ("ddpm", {"zero_terminal_snr": True})
    yield "ddpm-zero-snr", Case(zero_snr, trailing, 7, ("ddpm", {}), "v")
    for num_steps in (1, 6):
        yield f"lcm-{num_steps}", Case(SD, lcm_grid(num_steps), num_steps, ("lcm", {}))
    yield "lcm-v", Case(SD, lcm_grid(8), 8, ("lcm", {"timestep_scale": 0.001}), "v")


def lcm_grid(num_steps: int) -> Named:
    """Of every 20th step, counted from the last, as equally many as can be."""
    distilled = np.arange(1000, 0, -20)
    picked = distilled[np.floor(np.linspace(0, 50, num_steps, endpoint=False)).astype(int)]
    return "explicit", {"times": [*picked / 1000, 0.0]}


def scaled_cases():
    """diffusers' schedulers of x / alpha: Runge-Kutta steps in sigma."""
    solvers = {name: (name, {"variable": "sigma"}) for name in ("euler", "heun")}
    solvers |= {name: (name, {}) for name in ("euler_ancestral", "dpm2", "dpm2_ancestral")}
    low, high = np.sqrt(1.0 / GOLDEN["diffusers/betas-scaled_linear/signal"][[0, -1]] - 1.0)
    ends = {"sigma_min": low, "sigma_max": high}
    for name, solver in solvers.items():
        for grid, settings in {"linspace": {}, "leading": {"offset": 1}, "trailing": {}}.items():
            yield f"{name}-{grid}", Case(SD, (grid, settings), 10, solver)
        if name != "euler_ancestral":
            for grid in ("karras", "exponential"):
                yield f"{name}-{grid}", Case(SD, (grid, ends), 10, solver)
    for name in ("euler", "dpm2_ancestral"):
        # Between the steps of the process, diffusers interpolates sigma, not alpha^2.
        grid = ("explicit_sigmas", {"sigmas": GOLDEN[f"diffusers/{name}-interpolated/levels"]})
        yield f"{name}-interpolated", Case(LINEAR, grid, 7, solvers[name], "v")


def shifted(t, shift: float):
    return shift * t / (1.0 + (shift - 1.0) * t)


def raw_cases():
    """diffusers' schedulers for EDM, flows and consistency models."""
    for grid in ("karras", "exponential"):
        yield f"edm_euler-{grid}", Case(EDM, (grid, {}), 10, ("euler", {}), "edm")
    for shift, num_steps in ((1.0, 10), (3.0, 10), (5.0, 7)):
        # Equally spaced to 1 / 1000 shifted, then all shifted (again).
        equal = np.linspace(1.0, shifted(0.001, shift), num_steps)
        grid = ("explicit", {"times": [*shifted(equal, shift), 0.0]})
        yield f"flow-shift{shift:g}-{num_steps}", Case(FLOW, grid, num_steps, ("euler", {}), "velocity")
    shifts = {"sigmas-shift1": 1.0, "sigmas-shift3": 3.0, "mu0.5": np.exp(0.5), "mu1.15": np.exp(1.15)}
    for name, shift in shifts.items():
        yield f"flow-{name}", Case(FLOW, ("shifted", {"shift": shift}), 8, ("euler", {}), "velocity")
    for name in ("onestep", "multistep"):
        sigmas = GOLDEN[f"diffusers/cm-{name}/levels"]
        grid, solver = ("explicit_sigmas", {"sigmas": sigmas}), ("consistency", {"sigma_min": 0.002})
        yield f"cm-{name}", Case(EDM, grid, len(sigmas) - 1, solver, "edm", ("static", {}))


def k_diffusion_cases():
    karras = ("karras", {"sigma_min": 0.02, "sigma_max": 10.0})
    for theirs, ours in {"euler": "euler", "heun": "heun", "dpm_2": "dpm2"}.items():
        yield theirs, Case(EDM, karras, 10, (ours, {}), "edm")
    for eta, inflate in ((1.0, 1.0), (0.5, 1.05)):
        yield f"euler_ancestral-{eta}", Case(EDM, karras, 10, ("euler_ancestral", {"eta": eta}), "edm")
        for theirs in ("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"):
            solver = (theirs.replace("dpm_2", "dpm2"), {"eta": eta, "inflate": inflate})
            yield f"{theirs}-{eta}", Case(EDM, karras, 10, solver, "edm")
    churn = {"churn": 3.0, "sigma_min": 0.05, "sigma_max": 8.0, "inflate": 1.003}
    for method in ("euler", "heun"):
        yield f"{method}-churned", Case(EDM, karras, 10, ("edm", churn | {"method": method}), "edm")
    most = {"churn": 80.0, "sigma_min": 0.0, "sigma_max": np.inf, "inflate": 1.0}
    yield "heun-churned-most", Case(EDM, karras, 10, ("edm", most), "edm")
    for evaluations in (9, 10, 11):
        grid = ("exponential", karras[1] | {"to_zero": False})
        solver = ("dpm_fast", {"remainder": evaluations % 3})
        yield f"dpm_fast-{evaluations}", Case(EDM, grid, evaluations // 3 + 1, solver, "edm")


def flow_matching_cases():
    cases = {f"condot-{method}": FLOW for method in ("euler", "midpoint", "heun3", "rk4")}
    cases |= {f"cosine-{method}": ("trigonometric", {}) for method in ("midpoint", "rk4")}
    for name, schedule in cases.items():
        method = name.split("-")[1]
        solver = ("rk4_38" if method == "rk4" else method, {"last": "same"})
        yield f"ode-{name}", Case(schedule, ("uniform", {}), 8, solver, "velocity")


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


def noise_of_steps(keys: jax.Array):
    """In place of `normal_like`: what the other library was given, found by the key that the step has."""
    recorded = GOLDEN["noise"].astype(np.float32)
    fold = jax.vmap(lambda number: jax.random.key_data(jax.random.fold_in(keys[0], number)))
    of_steps = fold(jnp.arange(1, len(recorded) + 1))

    def normal_like(keys: jax.Array, x: jax.Array, draw: int = 0) -> jax.Array:
        step = (of_steps == jax.random.key_data(keys[0])).all(axis=-1).argmax()
        return jnp.asarray(recorded)[step, draw]

    return normal_like


RUNS = {}


def run_of(case: Case, schedule: Schedule, keys: jax.Array):
    """`(start, times) -> path`, compiled once for all cases that differ in their times only."""
    name = repr(case._replace(grid=None))
    if name in RUNS:
        return RUNS[name]
    solver, prediction = SOLVERS[case.solver[0]](**case.solver[1]), PREDICTIONS[case.prediction]()

    def net(x: jax.Array, t: jax.Array) -> jax.Array:
        coeffs = schedule(t)
        return combine(prediction(expand(coeffs, x)), estimate(x, coeffs))

    denoise = make_denoiser(net, schedule, prediction, INPUTS["time"](scale=1.0))
    if case.threshold != NONE:
        denoise = thresholded(denoise, schedule, THRESHOLDS[case.threshold[0]](**case.threshold[1]))

    def run(start: jax.Array, times: jax.Array) -> jax.Array:
        settings = {"shape": start.shape[1:], "times": times, "start": start, "trajectory": True}
        return sample(denoise, schedule, solver, keys=keys, **settings)

    RUNS[name] = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return RUNS[name]


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_the_original(name, monkeypatch):
    case, start, path = CASES[name], GOLDEN[f"{name}/start"], GOLDEN[f"{name}/path"]
    schedule = SCHEDULES[case.schedule[0]](**case.schedule[1])
    times = TIME_GRIDS[case.grid[0]](**case.grid[1])(schedule, case.num_steps)
    assert len(times) == case.num_steps + 1
    keys = jax.random.split(jax.random.key(0), len(start))
    monkeypatch.setattr(noise, "normal_like", noise_of_steps(keys))
    found = run_of(case, schedule, keys)(jnp.asarray(start, jnp.float32), jnp.asarray(times, jnp.float32))
    # Where alpha is 5e-5, x0 = (x - sigma eps) / alpha is no better in single precision.
    tolerance = 2e-4 if name == "diffusers/ddpm-cosine-trailing" else 1e-5
    for x, expected in zip(found[-len(path) :], path, strict=True):
        np.testing.assert_allclose(x, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("name", "num_steps"), [("linspace", 10), ("trailing", 7)])
def test_ddim_of_diffusers_lands_beside_its_own_grid(name, num_steps):
    """It goes from each t to t - T // n, and then on as if that were the next time: no grid does so."""
    case = f"diffusers/ddim-jumps-{name}"
    schedule, solver = SCHEDULES[SD[0]](**SD[1]), SOLVERS["ddim"]()
    steps = (GOLDEN[f"{case}/{what}"] for what in ("timesteps", "lands"))
    times, ends = (np.maximum(numbers + 1, 0).astype(np.float32) / 1000 for numbers in steps)
    assert len(times) == num_steps
    assert not np.allclose(times[1:], ends[:-1])

    @jax.jit
    def run(x):
        def step(x, now):
            x, _ = solver.step(lambda x, t: estimate(x, schedule(t)), schedule, x, *now, None, ())
            return x, x

        return jax.lax.scan(step, x, (times, ends))[1]

    found = run(jnp.asarray(GOLDEN[f"{case}/start"], jnp.float32))
    np.testing.assert_allclose(found, GOLDEN[f"{case}/path"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "schedule"),
    {
        "linear": LINEAR,
        "linear-100": ("ddpm", {"num_steps": 100, "beta_start": 0.001, "beta_end": 0.2}),
        "scaled_linear": SD,
        "cosine": COSINE,
        "linear-zero-snr": ("ddpm", {"zero_terminal_snr": True}),
        "scaled_linear-zero-snr": SD_ZERO_SNR,
        "cosine-zero-snr": ("ddpm", {"betas": "cosine", "zero_terminal_snr": True}),
    }.items(),
)
def test_every_step_of_the_discrete_processes(name, schedule):
    signal = GOLDEN[f"diffusers/betas-{name}/signal"]
    coeffs = SCHEDULES[schedule[0]](**schedule[1])(jnp.arange(1, len(signal) + 1) / len(signal))
    # i / T does not meet i exactly in single precision, and near t = 1 alpha changes much in one step.
    np.testing.assert_allclose(coeffs.alpha, np.sqrt(signal), rtol=1e-5)
    np.testing.assert_allclose(coeffs.sigma, np.sqrt(1.0 - signal), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "schedule"),
    {
        "condot": FLOW,
        "vp": ("vp", {}),
        "linear_vp": ("linear_vp", {}),
        "cosine": ("trigonometric", {}),
        "polynomial2": ("polynomial", {"power": 2.0}),
        "polynomial3": ("polynomial", {"power": 3.0}),
    }.items(),
)
def test_paths_of_flow_matching(name, schedule):
    golden = {what: GOLDEN[f"flow_matching/path-{name}/{what}"] for what in ("t", *Coeffs._fields)}
    coeffs = SCHEDULES[schedule[0]](**schedule[1])(jnp.asarray(golden["t"], jnp.float32))
    for what, found in coeffs._asdict().items():
        np.testing.assert_allclose(found, golden[what], rtol=1e-5, err_msg=what)


@pytest.mark.parametrize(
    ("name", "schedule", "grid"),
    [
        ("karras", EDM, ("karras", {})),
        ("karras-rho3", EDM, ("karras", {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 3.0})),
        ("karras-rho1", EDM, ("karras", {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 1.0})),
        ("karras", ("ve", {"sigma_min": 0.001, "sigma_max": 100.0}), ("karras", {"to_zero": False})),
        ("exponential", EDM, ("exponential", {})),
        ("vp", ("vp", {}), ("uniform", {"last_step": 1e-3})),
    ],
)
def test_noise_levels_of_the_grids_of_k_diffusion(name, schedule, grid):
    sigmas = GOLDEN[f"k_diffusion/grids-{name}/sigmas"]
    if not grid[1].get("to_zero", True):
        sigmas = sigmas[:-1]
    schedule = SCHEDULES[schedule[0]](**schedule[1])
    times = TIME_GRIDS[grid[0]](**grid[1])(schedule, len(sigmas) - 1)
    found = noise_to_signal(schedule(jnp.asarray(times, jnp.float32)))
    np.testing.assert_allclose(found, sigmas, rtol=1e-5)
