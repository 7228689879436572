import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine, edm, solve
from diffjax.diffusion.schedules import Coeffs, corrupt, cosine, expand, linear_flow

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
SCHEDULES = {"cosine": cosine(), "shifted": cosine(shift=0.25), "flow": linear_flow()}
TIMES = [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    return Estimate(*(random.normal(size=(len(TIMES), 2, 3)) for _ in range(2)))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("given", PREDICTIONS)
def test_every_prediction_gives_every_other(schedule, given, pair):
    with jax.enable_x64(True):
        truth = Estimate(*map(jnp.asarray, pair[:2]))
        coeffs = expand(schedule(jnp.asarray(TIMES)), truth.x0)
        x = coeffs.alpha * truth.x0 + coeffs.sigma * truth.eps
        row = PREDICTIONS[given]()(coeffs)
        found = solve(row, coeffs, x, combine(row, truth))
        np.testing.assert_allclose(found.x0, truth.x0, atol=1e-8)
        np.testing.assert_allclose(found.eps, truth.eps, atol=1e-8)
        for wanted, prediction in PREDICTIONS.items():
            other = prediction()(coeffs)
            np.testing.assert_allclose(
                combine(other, found), combine(other, truth), rtol=1e-6, atol=1e-6, err_msg=wanted
            )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_solution_explains_the_noisy_image_also_in_single_precision(schedule, name, pair):
    x, output = (jnp.asarray(part, jnp.float32) for part in pair[:2])
    coeffs = expand(schedule(jnp.asarray(TIMES)), x)
    row = PREDICTIONS[name]()(coeffs)
    found = solve(row, coeffs, x, output)
    scale = jnp.abs(coeffs.alpha * found.x0).max(axis=(1, 2)) + 1.0
    misfit = jnp.abs(coeffs.alpha * found.x0 + coeffs.sigma * found.eps - x).max(axis=(1, 2))
    assert (misfit < 2e-6 * scale).all()


def test_the_rows_are_what_their_names_say():
    coeffs = Coeffs(*map(jnp.float32, (0.8, 0.6, -0.3, 0.4)))
    rows = {name: tuple(map(float, row()(coeffs))) for name, row in PREDICTIONS.items()}
    expected = {
        "x0": (1.0, 0.0),
        "eps": (0.0, 1.0),
        "v": (-0.6, 0.8),
        "velocity": (-0.3, 0.4),
        "score": (0.0, -1.0 / 0.6),
        # c_skip = 0.25 / 0.8125, c_out = 0.75 * 0.5 / 0.8125^0.5 of x / alpha, whose noise level is 0.75
        "edm": ((1.0 - 0.25 / 0.8125) / (0.375 / 0.8125**0.5), -0.25 / 0.8125 * 0.75 / (0.375 / 0.8125**0.5)),
    }
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert row == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_velocity_is_the_time_derivative_of_the_path(schedule, pair):
    with jax.enable_x64(True):
        truth, t = Estimate(*map(jnp.asarray, pair[:2])), jnp.asarray(TIMES)
        _, speed = jax.jvp(lambda t: corrupt(schedule, *truth[:2], t), (t,), (jnp.ones_like(t),))
        row = PREDICTIONS["velocity"]()(expand(schedule(t), truth.x0))
        np.testing.assert_allclose(combine(row, truth), speed, rtol=1e-9, atol=1e-12)


def test_score_is_the_gradient_of_the_log_density(pair):
    truth = Estimate(*(jnp.asarray(part[0], jnp.float32) for part in pair[:2]))
    coeffs = cosine()(jnp.float32(0.4))
    x = coeffs.alpha * truth.x0 + coeffs.sigma * truth.eps
    gradient = jax.grad(
        lambda x: jax.scipy.stats.norm.logpdf(x, coeffs.alpha * truth.x0, coeffs.sigma).sum()
    )(x)
    np.testing.assert_allclose(combine(PREDICTIONS["score"]()(coeffs), truth), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine", cosine(logsnr_min=-100.0, logsnr_max=100.0)), ("linear", linear_flow(sigma_min=0.0))],
)
def test_velocities_agree_with_flow_matching(name, schedule):
    golden = {k.removeprefix("flow_matching/"): v for k, v in GOLDEN.items() if k.startswith("flow_m")}
    data, noise = golden["data"], golden["noise"]
    coeffs = expand(schedule(jnp.asarray(1.0 - golden["t"])), data)  # time runs the other way there
    x = coeffs.alpha * data + coeffs.sigma * noise
    np.testing.assert_allclose(x, golden[f"{name}/x"], atol=2e-6)
    row = PREDICTIONS["velocity"]()(coeffs)
    theirs = golden[f"{name}/velocity"]
    np.testing.assert_allclose(combine(row, Estimate(data, noise)), -theirs, atol=1e-5)
    found = solve(row, coeffs, x, -theirs)
    np.testing.assert_allclose(found.x0, golden[f"{name}/x0_from_velocity"], atol=1e-5)
    np.testing.assert_allclose(found.eps, golden[f"{name}/eps_from_velocity"], atol=1e-5)


@pytest.mark.parametrize("name", ["v", "eps"])
def test_conversions_agree_with_imagen_pytorch(name):
    golden = {k.removeprefix("imagen/cosine/"): v for k, v in GOLDEN.items()}
    zeros = np.zeros_like(golden["alpha"])
    coeffs = expand(Coeffs(golden["alpha"], golden["sigma"], zeros, zeros), golden["x"])
    found = solve(PREDICTIONS[name]()(coeffs), coeffs, golden["x"], golden["output"])
    np.testing.assert_allclose(found.x0, golden[f"x0_from_{name}"], rtol=1e-5, atol=1e-5)


def test_preconditioning_agrees_with_k_diffusion():
    golden = {k.removeprefix("kdiffusion/edm/"): v for k, v in GOLDEN.items()}
    sigma = golden["sigma"]
    coeffs = expand(
        Coeffs(np.ones_like(sigma), sigma, np.zeros_like(sigma), np.ones_like(sigma)), golden["x0"]
    )
    x = golden["x0"] + coeffs.sigma * golden["eps"]
    found = solve(edm(sigma_data=0.5)(coeffs), coeffs, x, golden["output"])
    np.testing.assert_allclose(found.x0, golden["denoised"], rtol=1e-5, atol=1e-5)
    assert math.isclose(float(golden["c_in"][1]), (0.3**2 + 0.5**2) ** -0.5, rel_tol=1e-6)
