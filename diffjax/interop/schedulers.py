"""The settings of diffusers' schedulers: which there are, and what they are where a file does not say.

A scheduler_config.json is untrusted: settings are of their defaults' types; what is not supported is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffjax.errors import UserError
from diffjax.interop.families import require
from diffjax.interop.samplers import Fragment

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "original_sample": "x0", "v_prediction": "v"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}

DISCRETE: Fragment = {
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
DEFAULTS: dict[str, Fragment] = {
    "DDIMScheduler": {**DISCRETE, **_RESCALED, **_CLIPPED, **_DYNAMIC, "set_alpha_to_one": True},
    "DDPMScheduler": {**DISCRETE, **_RESCALED, **_CLIPPED, **_DYNAMIC, "variance_type": "fixed_small"},
    "PNDMScheduler": {**DISCRETE, "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        **DISCRETE,
        **_RESCALED,
        **_SIGMAS,
        **_LINSPACE,
        **_ENDS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**DISCRETE, **_RESCALED, **_LINSPACE},
    "HeunDiscreteScheduler": {
        **DISCRETE,
        **_LATENT,
        **_CLIPPED,
        **_SIGMAS,
        **_LINSPACE,
        "clip_sample": False,
    },
    "DPMSolverMultistepScheduler": {
        **DISCRETE,
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **DISCRETE,
        **_MULTISTEP,
        **_ENDS,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    },
    "LCMScheduler": {
        **DISCRETE,
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
    "beta_schedule": tuple(BETAS),
    "prediction_type": tuple(PREDICTIONS),
}


def read_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All settings of a scheduler.

    Args:
      config: what is in its file.

    Returns:
      the settings, those that the file does not name included, and the names that are not known.

    Raises:
      UserError: its class or a setting is not supported, or is of the wrong type.
    """
    name = str(config.get("_class_name"))
    if name not in DEFAULTS:
        raise UserError(f"is of a {name!r:.80}; supported schedulers are {', '.join(DEFAULTS)}.")
    settings = {key: _checked(config, key, default) for key, default in DEFAULTS[name].items()}
    require(settings, **_UNSUPPORTED)
    for key in ("shift_terminal", "solver_p"):
        if settings.get(key):
            raise UserError(f"{key} is {settings[key]!r:.80}, which is not supported; expected null.")
    known = {key for defaults in DEFAULTS.values() for key in defaults}
    return settings, sorted(key for key in config if key not in known and not key.startswith("_"))


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
        raise UserError(f"{key} is {value!r:.80}; expected something like {default!r:.80}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
