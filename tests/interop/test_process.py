"""Schedulers of diffusers read as processes and samplers, against what they sample (make_process.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.config import sampler_config
from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.grids import TIME_GRIDS
from diffjax.diffusion.inputs import INPUTS
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import SCHEDULES, expand
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.thresholding import THRESHOLDS, thresholded
from diffjax.errors import UserError
from diffjax.experiment import build_sampler
from diffjax.interop.process import read_process, scheduler_config, write_process

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "process.npz"))
START, NOISE = (np.moveaxis(GOLDEN[name], -3, -1) for name in ("start", "noise"))
CASES = {
    f"{name}-{json.loads(str(GOLDEN[name]))[0]['_class_name']}": name.split("/")[0]
    for name in sorted(GOLDEN, key=lambda name: int("0" + name.split("/")[0]) if "/" in name else 0)
    if name.endswith("/config")
}
MEAN, STD = 0.3, 0.5


def case(number):
    """The file of a golden case, how it was called, and what it made."""
    config, call = json.loads(str(GOLDEN[f"{number}/config"]))
    return config, call, np.moveaxis(GOLDEN[f"{number}/final"], -3, -1)


def make(table, fragment):
    """What a fragment of a configuration stands for."""
    return table[fragment["name"]](**{key: value for key, value in fragment.items() if key != "name"})


def estimate(x, coeffs):
    """What the golden network says."""
    alpha, sigma, *_ = expand(coeffs, x)
    centred = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    bend = 0.1 * jnp.tanh(2.0 * x / jnp.hypot(alpha, sigma))
    return Estimate(MEAN + alpha * STD**2 * centred - sigma * bend, sigma * centred + alpha * bend)


def replace_noise(monkeypatch, keys):
    """In place of `normal_like`: what diffusers was given, found by the key that the step has."""
    fold = jax.vmap(lambda number: jax.random.key_data(jax.random.fold_in(keys[0], number)))
    of_steps = fold(jnp.arange(1, len(NOISE) + 1))

    def normal_like(keys, x, draw=0):
        return jnp.asarray(NOISE)[(of_steps == jax.random.key_data(keys[0])).all(axis=-1).argmax()]

    monkeypatch.setattr(noise, "normal_like", normal_like)


def run(process, sampler, monkeypatch):
    """A sample by the fragments alone, and the schedule at its last time."""
    schedule, prediction = make(SCHEDULES, process.schedule), make(PREDICTIONS, process.prediction)
    count = process.settings["num_train_timesteps"]
    shift = 0.0 if process.inputs["name"] == "time" else 1.0

    def net(x, told):
        coeffs = schedule((told + shift) / count)
        output = combine(prediction(expand(coeffs, x)), estimate(x, coeffs))
        return jnp.concatenate([output, jnp.tanh(x)], axis=-1) if process.learned_variance else output

    learned = process.learned_variance
    inputs = make(INPUTS, process.inputs)
    denoise = make_denoiser(net, schedule, prediction, inputs, learned_variance=learned)
    if sampler.threshold["name"] != "none":
        denoise = thresholded(denoise, schedule, make(THRESHOLDS, sampler.threshold))
    solver, times = (
        make(SOLVERS, sampler.solver),
        make(TIME_GRIDS, sampler.times)(schedule, sampler.num_steps),
    )
    assert len(times) == sampler.num_steps + 1
    keys = jax.random.split(jax.random.key(0), len(START))
    replace_noise(monkeypatch, keys)

    def draw(start):
        return sample(denoise, schedule, solver, keys=keys, shape=start.shape[1:], times=times, start=start)

    start = jnp.asarray(sampler.start_std * START, jnp.float32)
    return jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})(start), schedule(times[-1])


@pytest.mark.parametrize("number", CASES.values(), ids=CASES.keys())
def test_the_samplers_are_those_of_diffusers(number, monkeypatch):
    config, call, expected = case(number)
    process = read_process(config)
    num_steps = call.pop("num_steps")
    sampler = process.sampler(num_steps, **call)
    found, end = run(process, sampler, monkeypatch)
    if not config["_class_name"].startswith(("Euler", "Heun")):  # whose x is x / alpha
        found = found * end.alpha
    if config["_class_name"] == "DPMSolverMultistepScheduler" and config["use_karras_sigmas"]:
        assert process.inputs["rounded"]
    interpolated = sampler.times["name"] == "explicit_sigmas" or sampler.times["name"] in (
        "karras",
        "exponential",
    )
    # Between two steps the network is told a time that is nearly, not exactly, diffusers' own.
    tolerance = 1e-3 if interpolated and not process.inputs.get("rounded") else 1e-5
    if "least_signal" in process.schedule:
        tolerance = 1e-4  # alpha is 2e-4 at first
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("number", CASES.values(), ids=CASES.keys())
def test_writing_and_reading_again(number, tmp_path):
    process = read_process(case(number)[0])
    write_process(tmp_path, process)
    assert read_process(tmp_path) == process
    assert read_process(tmp_path / "scheduler_config.json") == process


DDPM = {"_class_name": "DDPMScheduler"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is of a 'None'; supported schedulers are DDIMScheduler"),
        ({"_class_name": "VQDiffusionScheduler"}, "is of a 'VQDiffusionScheduler'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', which is not supported"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ({"clip_sample_range": 2.0}, r"clip_sample_range is 2.0, which is not supported; expected 1.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; expected a whole number"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"beta_start": 0.5}, r"beta_start, beta_end and steps_offset are \[0.5, 0.02, 0\]"),
        ({"beta_end": float("nan")}, "beta_end is nan"),
        ({"steps_offset": -1}, "these make no process"),
        ({"clip_sample": 1}, "clip_sample is 1; expected something like True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers; expected 1000"),
        ({"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}, "not all between 0 and 1"),
        ({"trained_betas": "all"}, "trained_betas is 'all'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas is True"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "is 'log_linear'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas is True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 is False"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal is 0.1"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "'v_prediction'"),
    ],
)
def test_what_is_not_supported_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        read_process(config if config.get("_class_name") or not config else DDPM | config)


@pytest.mark.parametrize(
    ("config", "num_steps", "message"),
    [
        (DDPM, 1001, "num_steps is 1001; expected 1 to 1000"),
        (DDPM, -1, "num_steps is -1; expected 1 to 1000"),
        (DDPM | {"variance_type": "learned"}, 10, "variance_type is 'learned'"),
        (DDPM | {"thresholding": True, "sample_max_value": 0.5}, 10, "sample_max_value 0.5"),
        (DDPM | {"steps_offset": 200}, 10, "leave the 1000 of the process"),
        ({"_class_name": "LCMScheduler"}, 51, "expected at most 50, those that were distilled"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            10,
            "final_sigmas_type",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, 10, "solver_order is 4"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [1]}, 10, "disable_corrector is"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            10,
            "image tokens",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, 10, "of flows"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, 10, "shift of its times is 0"),
    ],
)
def test_samplers_that_are_refused(config, num_steps, message):
    process = read_process(config)
    with pytest.raises(UserError, match=message):
        process.sampler(num_steps)


def test_what_differs_is_said():
    def notes(name, num_steps=10, **settings):
        return " ".join(read_process({"_class_name": name, **settings}).sampler(num_steps).notes)

    assert notes("DDIMScheduler", clip_sample=False) == ""
    assert "use_clipped_model_output" in notes("DDIMScheduler")
    assert "do not end where the next" in notes(
        "DDIMScheduler", clip_sample=False, timestep_spacing="linspace"
    )
    large = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    assert "adds noise in the last step" in notes("DDPMScheduler", **large)
    assert "divides x by alpha" in notes("PNDMScheduler", skip_prk_steps=True, steps_offset=1)
    assert "extrapolates the network's output" in notes("PNDMScheduler", prediction_type="v_prediction")
    assert "the times are for 4 steps" in notes("LCMScheduler", 0)
    assert notes("DPMSolverMultistepScheduler", use_karras_sigmas=True) == ""
    assert "cut down" in notes("DPMSolverMultistepScheduler", use_exponential_sigmas=True)
    strange = read_process(DDPM | {"wobble": 1, "_diffusers_version": "0.42.1", "use_karras_sigmas": False})
    assert strange.notes == ("settings that are not known: wobble",)


SD = {"name": "ddpm", "betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_steps": 1000}
TIMESTEP, TIME = {"name": "timestep", "num_steps": 1000}, {"name": "time", "scale": 1000.0}


@pytest.mark.parametrize(
    ("schedule", "prediction", "inputs"),
    [
        (SD, "eps", TIMESTEP),
        (SD | {"zero_terminal_snr": True}, "v", TIMESTEP),
        ({"name": "ddpm", "betas": "cosine", "num_steps": 100}, "x0", TIMESTEP | {"num_steps": 100}),
        ({"name": "ddpm", "betas": (0.1, 0.2, 0.5), "num_steps": 3}, "eps", TIMESTEP | {"num_steps": 3}),
        ({"name": "linear_flow", "sigma_min": 0.0}, "velocity", TIME),
    ],
)
def test_what_was_trained_is_written_for_diffusers(tmp_path, schedule, prediction, inputs):
    write_process(tmp_path, scheduler_config(schedule, {"name": prediction}, inputs))
    process = read_process(tmp_path)
    assert process.schedule == schedule
    assert process.prediction == {"name": prediction}
    assert process.inputs == inputs
    assert process.notes == ()


def test_the_variance_the_threshold_and_the_shift_are_written():
    def written(**options):
        return read_process(scheduler_config(SD, {"name": "eps"}, TIMESTEP, **options))

    assert written(learned_variance=True).learned_variance
    assert written(learned_variance=True).sampler(10).solver == {"name": "ddpm", "variance": "learned"}
    for threshold in ({"name": "static"}, {"name": "dynamic", "percentile": 0.9, "max_value": 1.5}):
        assert written(threshold=threshold).sampler(10).threshold == threshold
    assert written().sampler(10).threshold == {"name": "none"}
    flow = scheduler_config({"name": "linear_flow"}, {"name": "velocity"}, {"name": "time"}, shift=3.0)
    assert read_process(flow).sampler(10, even=True).times == {"name": "shifted", "shift": 3.0, "last": 0.0}


@pytest.mark.parametrize(
    ("schedule", "prediction", "inputs"),
    [
        ({"name": "cosine"}, "v", {"name": "logsnr"}),
        (SD, "edm", TIMESTEP),
        (SD, "eps", {"name": "logsnr"}),
        (SD, "eps", TIMESTEP | {"num_steps": 500}),
        ({"name": "linear_flow", "shift": 2.0}, "velocity", TIME),
        ({"name": "linear_flow", "sigma_min": 0.01}, "velocity", TIME),
        ({"name": "linear_flow"}, "x0", TIME),
        ({"name": "linear_flow"}, "velocity", TIME | {"scale": 0.5}),
    ],
)
def test_a_process_that_diffusers_lacks_is_refused(schedule, prediction, inputs):
    with pytest.raises(UserError, match="diffusers has no scheduler for"):
        scheduler_config(schedule, {"name": prediction}, inputs)


def test_the_fragments_are_entries_of_a_configuration():
    sampler = read_process(
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    ).sampler()
    assert sampler.config() == {
        "solver": {"name": "plms", "start": "heun"},
        "num_steps": 50,
        "times": {"name": "leading", "train_steps": 1000, "offset": 1, "last": 1, "spare": 0},
        "threshold": {"name": "none"},
    }
    build_sampler(sampler_config(**sampler.config()), "sampler")
