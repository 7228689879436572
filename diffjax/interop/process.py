"""The process of a public checkpoint: a scheduler_config.json of diffusers in the words of our configuration.

A scheduler of diffusers says three things at once: which noise the network was trained with, what its output
means, and how it is sampled. Here they are the fragments of `diffjax.config` of the same names. What cannot
be reproduced is refused; what differs a little is said in the `notes` of the process and of the sampler.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.errors import UserError
from diffjax.interop.families import number, require
from diffjax.interop.samplers import ALMOST_ZERO_SNR, SAMPLERS, Fragment, Sampler, rounds
from diffjax.interop.store import read_json

FILE = "scheduler_config.json"


class Process(NamedTuple):
    """What a network was trained with.

    Attributes:
      scheduler: the class of diffusers.
      schedule: the fragment of the noise schedule.
      prediction: the fragment of what the network's output means.
      inputs: the fragment of what the network is told of the time.
      learned_variance: whether its sampler asks the network for a learned variance.
      settings: the scheduler's settings, those that the file does not name included.
      notes: what the file says that has no effect here.
    """

    scheduler: str
    schedule: Fragment
    prediction: Fragment
    inputs: Fragment
    learned_variance: bool
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def sampler(self, num_steps: int = 0, *, tokens: int = 0, even: bool = False) -> Sampler:
        """The scheduler as a sampler.

        Args:
          num_steps: for how many steps; 0: 50, or 4 for LCM.
          tokens: the number of image tokens, on which the shift of FLUX and some others depends.
          even: whether the pipeline gives the scheduler equally spaced noise levels, as FLUX's does.
        """
        count = num_steps or (4 if self.scheduler == "LCMScheduler" else 50)
        steps = self.settings["num_train_timesteps"]
        if not 1 <= count <= steps:
            raise UserError(f"num_steps is {num_steps}; expected 1 to {steps}, the steps of the process.")
        try:
            return SAMPLERS[self.scheduler](self.settings, count, tokens=tokens, even=even)
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"the settings of its {self.scheduler} make no sampler ({error}).") from error


def read_process(source: Path | Mapping[str, Any]) -> Process:
    """Read a scheduler.

    Args:
      source: a scheduler's folder or file, or what is in the file.

    Raises:
      UserError: it is no scheduler, or one that says what is not supported.
    """
    if isinstance(source, Mapping):
        return _read(source)
    path = source / FILE if source.is_dir() else source
    try:
        return _read(read_json(path))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error


def write_process(folder: Path, config: Process | Mapping[str, Any]) -> None:
    """Write scheduler_config.json; see `scheduler_config` for one that was trained here."""
    if isinstance(config, Process):
        config = {"_class_name": config.scheduler, **config.settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def scheduler_config(
    schedule: Mapping[str, Any],
    prediction: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    learned_variance: bool = False,
    shift: float = 1.0,
    threshold: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What scheduler_config.json says of a process that was trained here.

    Args:
      schedule: the fragment of the noise schedule, "ddpm" or "linear_flow".
      prediction: the fragment of the prediction.
      inputs: the fragment of what the network is told.
      learned_variance: whether the network learns the variance.
      shift: of the sampler's times, for "linear_flow".
      threshold: the fragment of the sampler's threshold, for "ddpm".

    Raises:
      UserError: diffusers has no scheduler for this process.
    """
    fragments = {"schedule": dict(schedule), "prediction": dict(prediction), "inputs": dict(inputs)}
    result = {"ddpm": _discrete_config, "linear_flow": _flow_config}.get(schedule["name"], lambda **_: {})(
        **fragments
    )
    if not result:
        raise UserError(
            f"diffusers has no scheduler for {fragments}; it has them for the schedule ddpm told the "
            "timestep, and for velocity on linear_flow told the time."
        )
    if schedule["name"] == "linear_flow":
        return {**result, "shift": float(shift)}
    result["variance_type"] = "learned_range" if learned_variance else "fixed_small"
    clip = threshold or {"name": "none"}
    result |= {"clip_sample": clip["name"] == "static", "thresholding": clip["name"] == "dynamic"}
    if result["thresholding"]:
        # No limit is None here; there it must be a number.
        most = clip.get("max_value") or 1e6
        result |= {"dynamic_thresholding_ratio": clip.get("percentile", 0.995), "sample_max_value": most}
    return result


def _flow_config(schedule: Fragment, prediction: Fragment, inputs: Fragment) -> Fragment:
    scale = inputs.get("scale", 1000.0)
    fits = prediction["name"] == "velocity" and inputs["name"] == "time" and schedule.get("shift", 1.0) == 1.0
    # Ends that are pulled in by 1e-4 make no difference that a network could tell.
    if not fits or schedule.get("sigma_min", 1e-4) > 1e-4 or scale < 1 or scale != int(scale):
        return {}
    return {"_class_name": _FLOW, "num_train_timesteps": int(scale)}


def _discrete_config(schedule: Fragment, prediction: Fragment, inputs: Fragment) -> Fragment:
    steps, betas = schedule.get("num_steps", 1000), schedule.get("betas", "linear")
    named = {ours: theirs for theirs, ours in _PREDICTIONS.items() if theirs != "original_sample"}
    fits = inputs["name"] == "timestep" and inputs.get("num_steps", 1000) == steps
    if not fits or prediction["name"] not in named or schedule.get("least_signal"):
        return {}
    shapes = {ours: theirs for theirs, ours in _BETAS.items()}
    by_name = isinstance(betas, str)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **{key: schedule.get(key, _DISCRETE[key]) for key in ("beta_start", "beta_end")},
        **({"beta_schedule": shapes[betas]} if by_name else {"trained_betas": list(betas)}),
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "prediction_type": named[prediction["name"]],
    }


_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "original_sample": "x0", "v_prediction": "v"}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}

_DISCRETE: Fragment = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_RESCALED = {"rescale_betas_zero_snr": False}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_DYNAMIC = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_LINSPACE = {"timestep_spacing": "linspace"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_ENDS: Fragment = {"sigma_min": None, "sigma_max": None}
_MULTISTEP = {
    **_RESCALED,
    **_DYNAMIC,
    **_SIGMAS,
    **_LINSPACE,
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}

# What each scheduler may be told, with what it takes where it is told nothing.
_DEFAULTS: dict[str, Fragment] = {
    "DDIMScheduler": {**_DISCRETE, **_RESCALED, **_CLIPPED, **_DYNAMIC, "set_alpha_to_one": True},
    "DDPMScheduler": {**_DISCRETE, **_RESCALED, **_CLIPPED, **_DYNAMIC, "variance_type": "fixed_small"},
    "PNDMScheduler": {**_DISCRETE, "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        **_DISCRETE,
        **_RESCALED,
        **_SIGMAS,
        **_LINSPACE,
        **_ENDS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_DISCRETE, **_RESCALED, **_LINSPACE},
    "HeunDiscreteScheduler": {
        **_DISCRETE,
        **_LATENT,
        **_CLIPPED,
        **_SIGMAS,
        **_LINSPACE,
        "clip_sample": False,
    },
    "DPMSolverMultistepScheduler": {
        **_DISCRETE,
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_DISCRETE,
        **_MULTISTEP,
        **_ENDS,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    },
    "LCMScheduler": {
        **_DISCRETE,
        **_LATENT,
        **_RESCALED,
        **_CLIPPED,
        **_DYNAMIC,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "EDMEulerScheduler": {
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "sigma_schedule": "karras",
        "rho": 7.0,
        "final_sigmas_type": "zero",
    },
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
_FINITE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
_UNSUPPORTED = {
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "lambda_min_clipped": -math.inf,
    "clip_sample_range": 1.0,
    "invert_sigmas": False,
    "predict_x0": True,
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "time_shift_type": ("exponential", "linear"),
    "beta_schedule": tuple(_BETAS),
    "prediction_type": tuple(_PREDICTIONS),
}


def _read(config: Mapping[str, Any]) -> Process:
    name = str(config.get("_class_name"))
    if name not in _DEFAULTS:
        raise UserError(f"is of a {name!r}; supported schedulers are {', '.join(_DEFAULTS)}.")
    settings = {key: _checked(config, key, default) for key, default in _DEFAULTS[name].items()}
    require(settings, **_UNSUPPORTED)
    for key in ("shift_terminal", "solver_p"):
        if settings.get(key):
            raise UserError(f"{key} is {settings[key]!r}, which is not supported; expected null.")
    known = {key for defaults in _DEFAULTS.values() for key in defaults}
    strange = sorted(key for key in config if key not in known and not key.startswith("_"))
    notes = (f"settings that are not known: {', '.join(strange)}",) if strange else ()
    steps = number(settings, "num_train_timesteps")
    schedule: Fragment
    inputs: Fragment
    if name == _FLOW:
        inputs = {"name": "time", "scale": float(steps)}
        schedule = {"name": "linear_flow", "sigma_min": 0.0}
        return Process(name, schedule, {"name": "velocity"}, inputs, False, settings, notes)
    if name == "EDMEulerScheduler":
        # Its "epsilon" is EDM's F.
        require(settings, prediction_type="epsilon", final_sigmas_type="zero")
        require(settings, sigma_schedule=("karras", "exponential"))
        told = {"name": "edm", "sigma_data": float(settings["sigma_data"])}
        schedule = {"name": "edm", "sigma_max": float(settings["sigma_max"])}
        return Process(name, schedule, told, told, False, settings, notes)
    if not 0.0 < settings["beta_start"] <= settings["beta_end"] < 1.0 or settings["steps_offset"] < 0:
        given = [settings[key] for key in ("beta_start", "beta_end", "steps_offset")]
        raise UserError(f"beta_start, beta_end and steps_offset are {given}; these make no process.")
    schedule = {"name": "ddpm", "num_steps": steps}
    if settings["trained_betas"] is not None:
        if len(settings["trained_betas"]) != steps:
            raise UserError(f"trained_betas has {len(settings['trained_betas'])} numbers; expected {steps}.")
        if not all(0.0 < beta < 1.0 for beta in settings["trained_betas"]):
            raise UserError("trained_betas are not all between 0 and 1.")
        schedule["betas"] = tuple(settings["trained_betas"])
    else:
        schedule |= {"betas": _BETAS[settings["beta_schedule"]]}
        if settings["beta_schedule"] != "squaredcos_cap_v2":
            schedule |= {key: settings[key] for key in ("beta_start", "beta_end")}
    if settings.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
        if name in _FINITE:
            schedule["least_signal"] = ALMOST_ZERO_SNR
    prediction: Fragment = {"name": _PREDICTIONS[settings["prediction_type"]]}
    learned = settings.get("variance_type") == "learned_range" and name == "DDPMScheduler"
    inputs = {"name": "timestep", "num_steps": steps}
    if "lower_order_final" in settings and rounds(settings):
        inputs["rounded"] = True
    return Process(name, schedule, prediction, inputs, learned, settings, notes)


def _checked(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A setting that is of its default's type."""
    value = config.get(key)
    if value is None:
        return default
    if key in ("trained_betas", "disable_corrector"):
        valid = isinstance(value, list) and all(_is_number(item) for item in value)
    elif isinstance(default, bool):
        valid = isinstance(value, bool)
    elif isinstance(default, int):
        valid = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float) or key in _ENDS:
        valid = _is_number(value)
    else:
        valid = default is None or isinstance(value, str)
    if not valid:
        raise UserError(f"{key} is {value!r}; expected something like {default!r}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
