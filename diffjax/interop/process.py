"""The process of a public checkpoint: a scheduler_config.json of diffusers in the words of our configuration.

A scheduler of diffusers says three things at once: which noise the network was trained with, what its output
means, and how it is sampled. Here they are the fragments of `diffjax.config` of the same names. What cannot
be reproduced is refused; what differs a little is said in the `notes` of the process and of the sampler.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.errors import UserError
from diffjax.interop.families import number, require
from diffjax.interop.samplers import ALMOST_ZERO_SNR, SAMPLERS, Fragment, Sampler, rounds
from diffjax.interop.schedulers import BETAS, DISCRETE, PREDICTIONS, read_settings
from diffjax.untrusted import read_json

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
    named = {ours: theirs for theirs, ours in PREDICTIONS.items() if theirs != "original_sample"}
    fits = inputs["name"] == "timestep" and inputs.get("num_steps", 1000) == steps
    if not fits or prediction["name"] not in named or schedule.get("least_signal"):
        return {}
    shapes = {ours: theirs for theirs, ours in BETAS.items()}
    by_name = isinstance(betas, str)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **{key: schedule.get(key, DISCRETE[key]) for key in ("beta_start", "beta_end")},
        **({"beta_schedule": shapes[betas]} if by_name else {"trained_betas": list(betas)}),
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "prediction_type": named[prediction["name"]],
    }


_FLOW = "FlowMatchEulerDiscreteScheduler"
_FINITE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def _read(config: Mapping[str, Any]) -> Process:
    name = str(config.get("_class_name"))
    settings, strange = read_settings(config)
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
        schedule |= {"betas": BETAS[settings["beta_schedule"]]}
        if settings["beta_schedule"] != "squaredcos_cap_v2":
            schedule |= {key: settings[key] for key in ("beta_start", "beta_end")}
    if settings.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
        if name in _FINITE:
            schedule["least_signal"] = ALMOST_ZERO_SNR
    prediction: Fragment = {"name": PREDICTIONS[settings["prediction_type"]]}
    learned = settings.get("variance_type") == "learned_range" and name == "DDPMScheduler"
    inputs = {"name": "timestep", "num_steps": steps}
    if "lower_order_final" in settings and rounds(settings):
        inputs["rounded"] = True
    return Process(name, schedule, prediction, inputs, learned, settings, notes)
