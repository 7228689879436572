"""What the schedulers of diffusers do with their settings, as samplers in the words of our configuration.

Steps are numbered there from 0, the least noisy one; step i is our time (i + 1) / T.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax.errors import UserError

ALMOST_ZERO_SNR = 2.0**-24  # alpha^2 at the last step, where sigma / alpha must stay finite

Fragment = dict[str, Any]
Settings = Mapping[str, Any]


class Sampler(NamedTuple):
    """How a checkpoint is sampled by default.

    Attributes:
      solver: the fragment of the solver.
      num_steps: for how many steps.
      times: the fragment of the time grid.
      threshold: the fragment of the threshold.
      start_std: the standard deviation of the noise that the original starts from, at the scale of x; ours is
        the schedule's sigma at the first time.
      notes: where the original differs.
    """

    solver: Fragment
    num_steps: int
    times: Fragment
    threshold: Fragment
    start_std: float = 1.0
    notes: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The entries of `diffjax.config.sampler_config`."""
        return {key: getattr(self, key) for key in ("solver", "num_steps", "times", "threshold")}


def _ratios(settings: Settings) -> np.ndarray:
    """sigma / alpha of each step, `[T]`."""
    count, start, end = (settings[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if settings["trained_betas"] is not None:
        betas = np.asarray(settings["trained_betas"], np.float64)
    elif settings["beta_schedule"] == "linear":
        betas = np.linspace(start, end, count)
    elif settings["beta_schedule"] == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    else:
        angle = (np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2.0
        betas = np.minimum(1.0 - np.cos(angle[1:]) ** 2 / np.cos(angle[:-1]) ** 2, 0.999)
    alphas = np.cumprod(1.0 - betas) ** 0.5
    if settings.get("rescale_betas_zero_snr"):
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        alphas[-1] = ALMOST_ZERO_SNR**0.5
    return np.sqrt(1.0 / alphas**2 - 1.0)


def _steps(settings: Settings, count: int, *, spare: int = 0, rounded: bool = True) -> np.ndarray:
    """The numbers of the steps that diffusers visits, counted from zero, `[count]`."""
    total, spacing = settings["num_train_timesteps"], settings["timestep_spacing"]
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / count))[:count] - 1.0
    if spacing == "leading":
        steps = np.arange(count + spare)[::-1] * (total // (count + spare)) + settings["steps_offset"]
    else:
        steps = np.linspace(0.0, total - 1.0, count + spare)[::-1]
        steps = np.round(steps) if rounded else steps
    if steps[0] > total - 1:
        raise UserError(f"{count} steps from {settings['steps_offset']} on leave the {total} of the process.")
    return steps[:count]


def _grid(settings: Settings, steps: np.ndarray, *, clean: bool, spare: int = 0) -> Fragment:
    """The grid of whole steps that ends with the clean image, or with the least noisy step."""
    total, spacing = settings["num_train_timesteps"], settings["timestep_spacing"]
    if not clean and steps[-1] == 0.0:
        steps = steps[:-1]  # from the least noisy step to itself nothing happens
    elif spacing == "leading":
        offset, last = settings["steps_offset"], int(not clean)
        return {"name": "leading", "train_steps": total, "offset": offset, "last": last, "spare": spare}
    elif clean and spacing == "trailing":
        return {"name": "trailing", "train_steps": total}
    elif clean:
        return {"name": "linspace", "train_steps": total, "rounded": True, "spare": spare}
    times = [(step + 1.0) / total for step in steps]
    return {"name": "explicit", "times": (*times, 0.0 if clean else 1.0 / total)}


def _threshold(settings: Settings) -> Fragment:
    if settings.get("thresholding"):
        ratio, most = (settings[key] for key in ("dynamic_thresholding_ratio", "sample_max_value"))
        if not 0.0 < ratio <= 1.0 or most < 1.0:
            raise UserError(f"dynamic_thresholding_ratio is {ratio} and sample_max_value {most}; at least 1.")
        return {"name": "dynamic", "percentile": ratio, "max_value": float(most)}
    return {"name": "static" if settings.get("clip_sample") else "none"}


def _made(
    solver: Fragment, times: Fragment, settings: Settings, count: int, *notes: str, start_std: float = 1.0
) -> Sampler:
    if times.get("last") == 1 or times.get("times", (0.0,))[-1] > 0.0:
        notes += (
            "it ends in the least noisy step, where `sample` divides x by alpha; the original does not",
        )
    if times["name"].startswith("explicit"):
        count = len(times.get("times") or times["sigmas"]) - 1
        notes += (f"the times are for {count} steps; ask for the sampler of another number",)
    return Sampler(solver, count, times, _threshold(settings), start_std, notes)


def _jumps(settings: Settings, steps: np.ndarray, count: int) -> tuple[str, ...]:
    """DDIM and PNDM go from each step i to i - T // N, whichever the next one is."""
    if (np.diff(steps) == -(settings["num_train_timesteps"] // count)).all():
        return ()
    return ("the original's steps of this spacing do not end where the next ones begin; here they do",)


def _ddim(settings: Settings, count: int, **_: Any) -> Sampler:
    steps = _steps(settings, count)
    notes = _jumps(settings, steps, count)
    if _threshold(settings)["name"] != "none":
        notes += ("x0 is clipped and eps moves with it; in the original only with use_clipped_model_output",)
    grid = _grid(settings, steps, clean=settings["set_alpha_to_one"])
    return _made({"name": "ddim", "eta": 0.0}, grid, settings, count, *notes)


def _ddpm(settings: Settings, count: int, **_: Any) -> Sampler:
    steps = _steps(settings, count)
    kinds = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
    kinds["learned_range"] = "learned"
    if settings["variance_type"] not in kinds:
        given = settings["variance_type"]
        raise UserError(
            f"variance_type is {given!r:.80}, which is not supported; expected one of {', '.join(kinds)}."
        )
    solver = {"name": "ddpm", "variance": kinds[settings["variance_type"]]}
    notes: tuple[str, ...] = ()
    if steps[-1] > 0 and solver["variance"] != "small":
        notes = ("the original adds noise in the last step too where that is not step 0; here none is added",)
    return _made(solver, _grid(settings, steps, clean=True), settings, count, *notes)


def _pndm(settings: Settings, count: int, **_: Any) -> Sampler:
    steps = _steps(settings, count)
    notes = _jumps(settings, steps, count)
    if settings["prediction_type"] != "epsilon":
        notes += ("the original extrapolates the network's output; here its eps is",)
    if not settings["skip_prk_steps"] and settings["num_train_timesteps"] // count % 2:
        notes += ("the original's first steps are evaluated half a step beside their middles",)
    solver = {"name": "plms", "start": "heun" if settings["skip_prk_steps"] else "runge_kutta"}
    return _made(solver, _grid(settings, steps, clean=settings["set_alpha_to_one"]), settings, count, *notes)


def _in_sigma(solver: Fragment) -> Callable[..., Sampler]:
    """The schedulers of x / alpha."""

    def make(settings: Settings, count: int, **_: Any) -> Sampler:
        ratios = _ratios(settings)
        steps = _steps(settings, count, rounded=False)
        levels = np.interp(steps, np.arange(len(ratios)), ratios)
        clean = settings.get("final_sigmas_type", "zero") == "zero"
        spaced = _spaced(settings, levels, clean)
        whole = bool((steps == np.round(steps)).all())
        notes: tuple[str, ...] = ()
        if spaced:
            grid = spaced
            if settings["timestep_spacing"] != "linspace":
                notes = ("the noise levels reach as far as those of this number of steps",)
        elif whole:
            grid = _grid(settings, steps, clean=clean)
        else:
            sigmas = (*map(float, levels), 0.0 if clean else float(ratios[0]))
            grid = {"name": "explicit_sigmas", "sigmas": sigmas}
            notes = (
                "between two steps the original interpolates sigma / alpha; the network is told our time",
            )
        first = spaced["sigma_max"] if spaced else levels[0]
        # diffusers' noise is of the noise level alone but where it begins below the last step.
        heads_up = settings["timestep_spacing"] == "leading"
        start_std = 1.0 if heads_up else float(first / math.hypot(1.0, first))
        return _made(solver, grid, settings, count, *notes, start_std=start_std)

    return make


def _spaced(settings: Settings, levels: np.ndarray, clean: bool) -> Fragment:
    """The grid between two noise levels, where there is to be one."""
    kinds = [kind for kind in ("karras", "exponential") if settings.get(f"use_{kind}_sigmas")]
    if not kinds:
        return {}
    if len(kinds) > 1 or not clean:
        raise UserError(f"{' and '.join(kinds)} sigmas with final_sigmas_type sigma_min are not supported.")
    ends = {"sigma_min": settings.get("sigma_min"), "sigma_max": settings.get("sigma_max")}
    low = float(levels[-1]) if ends["sigma_min"] is None else float(ends["sigma_min"])
    high = float(levels[0]) if ends["sigma_max"] is None else float(ends["sigma_max"])
    return {"name": kinds[0], "sigma_min": low, "sigma_max": high}


def _multistep(solver: Callable[[Settings, int], Fragment]) -> Callable[..., Sampler]:
    """DPM-Solver and UniPC: one step fewer of the spacing is visited than it has."""

    def make(settings: Settings, count: int, **_: Any) -> Sampler:
        ratios = _ratios(settings)
        clean = settings["final_sigmas_type"] == "zero"
        grid = _spaced(settings, ratios[::-1], clean)
        notes: tuple[str, ...] = ()
        if grid:
            if not rounds(settings):
                notes = ("the original tells the network whole steps, cut down; here it is told the time",)
        else:
            grid = _grid(settings, _steps(settings, count, spare=1), clean=clean, spare=1)
        return _made(solver(settings, count), grid, settings, count, *notes)

    return make


def rounds(settings: Settings) -> bool:
    """Whether a multistep scheduler tells the network the nearest step of the levels that it visits."""
    # DPM-Solver, unlike UniPC, cuts them down where the betas are the cosine's.
    cut = "algorithm_type" in settings and settings["beta_schedule"] == "squaredcos_cap_v2"
    return settings["use_karras_sigmas"] and not cut


def _dpm(settings: Settings, count: int) -> Fragment:
    kinds = {"dpmsolver++": ("x0", 0.0), "sde-dpmsolver++": ("x0", 1.0), "dpmsolver": ("eps", 0.0)}
    kinds["deis"] = kinds["dpmsolver++"]  # what diffusers makes of it
    algorithm, order, final = (
        settings[key] for key in ("algorithm_type", "solver_order", "final_sigmas_type")
    )
    if algorithm not in kinds or (algorithm == "dpmsolver" and final == "zero"):
        raise UserError(
            f"algorithm_type {algorithm!r:.80} with final_sigmas_type {final!r:.80} is not supported."
        )
    if order not in (1, 2, 3) or (order == 3 and algorithm.startswith("sde")):
        raise UserError(f"solver_order is {order}; expected 1 to 3, or to 2 for {algorithm}.")
    if settings["euler_at_final"] and final != "zero" and not (settings["lower_order_final"] and count < 15):
        raise UserError("euler_at_final with final_sigmas_type sigma_min is not supported.")
    of, eta = kinds[algorithm]
    variant = "heun" if settings["solver_type"] == "heun" else "midpoint"
    solver = {"name": "dpm_multistep", "order": order, "variant": variant, "of": of, "eta": eta}
    return {**solver, "lower_order_final": settings["lower_order_final"]}


def _unipc(settings: Settings, count: int) -> Fragment:
    order, off = settings["solver_order"], settings["disable_corrector"]
    if order not in (1, 2, 3):
        raise UserError(f"solver_order is {order}; expected 1 to 3.")
    if off and not set(range(count - 1)) <= set(off):
        raise UserError(f"disable_corrector is {off}; expected none of the steps, or all.")
    variant = "bh1" if settings["solver_type"] == "bh1" else "bh2"
    solver = {"name": "unipc", "order": order, "variant": variant, "corrector": not off}
    return {**solver, "lower_order_final": settings["lower_order_final"]}


def _lcm(settings: Settings, count: int, **_: Any) -> Sampler:
    total, distilled = settings["num_train_timesteps"], settings["original_inference_steps"]
    if not count <= distilled <= total:
        raise UserError(f"num_steps is {count}; expected at most {distilled}, those that were distilled.")
    visited = np.arange(1, distilled + 1)[::-1] * (total // distilled)
    visited = visited[np.floor(np.linspace(0, distilled, count, endpoint=False)).astype(int)]
    times = tuple(float(step) / total for step in visited)
    scale = {"timestep_scale": float(settings["timestep_scaling"]), "train_steps": total}
    return _made({"name": "lcm", **scale}, {"name": "explicit", "times": (*times, 0.0)}, settings, count)


def _flow(settings: Settings, count: int, *, tokens: int, even: bool) -> Sampler:
    least = 1.0 / settings["num_train_timesteps"]
    if any(settings[f"use_{kind}_sigmas"] for kind in ("karras", "exponential")):
        raise UserError("karras and exponential sigmas of flows are not supported.")
    shift = float(settings["shift"])
    if settings["use_dynamic_shifting"]:
        if not tokens:
            raise UserError("the shift of its times depends on the number of image tokens; say how many.")
        low, high = settings["base_image_seq_len"], settings["max_image_seq_len"]
        slope = (settings["max_shift"] - settings["base_shift"]) / (high - low)
        mu = settings["base_shift"] + slope * (tokens - low)
        shift = math.exp(mu) if settings["time_shift_type"] == "exponential" else mu
    else:
        least = shift * least / (1.0 + (shift - 1.0) * least)  # and it is shifted once more
    if not shift > 0.0:
        raise UserError(f"the shift of its times is {shift}; expected more than 0.")
    # From one noise level alone, it goes to zero.
    last = 0.0 if even or count == 1 else least
    solver = {"name": "consistency"} if settings["stochastic_sampling"] else {"name": "euler"}
    return _made(solver, {"name": "shifted", "shift": shift, "last": last}, settings, count)


def _edm(settings: Settings, count: int, **_: Any) -> Sampler:
    grid = {key: float(settings[key]) for key in ("sigma_min", "sigma_max")}
    grid = {"name": settings["sigma_schedule"], **grid}
    if grid["name"] == "karras":
        grid["rho"] = float(settings["rho"])
    return _made({"name": "euler"}, grid, settings, count, start_std=math.hypot(grid["sigma_max"], 1.0))


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _in_sigma({"name": "euler", "variable": "sigma"}),
    "EulerAncestralDiscreteScheduler": _in_sigma({"name": "euler_ancestral"}),
    "HeunDiscreteScheduler": _in_sigma({"name": "heun", "variable": "sigma"}),
    "DPMSolverMultistepScheduler": _multistep(_dpm),
    "UniPCMultistepScheduler": _multistep(_unipc),
    "LCMScheduler": _lcm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "EDMEulerScheduler": _edm,
}
