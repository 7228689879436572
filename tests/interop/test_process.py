"""Schedulers of diffusers read as processes and samplers, against what they sample (make_process.py)."""

import json
from pathlib import Path

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
from diffjax.diffusion.schedules import SCHEDULES, expand
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.thresholding import THRESHOLDS, thresholded
from diffjax.errors import UserError
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
    solver, times = make(SOLVERS, sampler.solver), make(TIME_GRIDS, sampler.times)(schedule, sampler.num_steps)
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
    interpolated = sampler.times["name"] == "explicit_sigmas" or sampler.times["name"] in ("karras", "exponential")
    # Between two steps the network is told a time that is nearly, not exactly, diffusers' own.
    tolerance = 1e-3 if interpolated and not process.inputs.get("rounded") else 1e-5
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("number", CASES.values(), ids=CASES.keys())
def test_writing_and_reading_again(number, tmp_path):
    process = read_process(case(number)[0])
    write_process(tmp_path, process)
    assert read_process(tmp_path) == process
    assert read_process(tmp_path / "scheduler_config.json") == process
