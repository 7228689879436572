import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import schedules
from diffjax.diffusion.schedules import cosine, linear_flow, logsnr, time_at

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
COSINES = {
    "cosine": cosine(),
    "cosine, shift 1/4": cosine(shift=0.25),
    "cosine, shift 4": cosine(shift=4.0),
    "cosine, -8 to 10": cosine(logsnr_min=-8.0, logsnr_max=10.0),
}
SCHEDULES = COSINES | {"flow": linear_flow(), "flow, 0.01": linear_flow(sigma_min=0.01)}
EVERY = {name: factory() for name, factory in schedules.SCHEDULES.items()} | {
    "flow, shift 3": linear_flow(sigma_min=0.0, shift=3.0),
    "cosine, shift 4": cosine(shift=4.0),
    "ddpm, zero terminal": schedules.ddpm(betas="scaled_linear", zero_terminal_snr=True),
    "ddpm, cosine": schedules.ddpm(betas="cosine"),
    "vp, scaled": schedules.vp(beta_min=0.85, beta_max=12.0, scaled=True),
}
# Off the grid of the discrete processes, on which their derivatives jump.
NEAR_ENDS = np.array(
    [0.0, 1e-6, 1.3e-4, 1.03e-2, 0.3003, 0.5004, 0.7003, 0.9903, 1 - 1.3e-4, 1 - 1e-6, 1.0], np.float32
)


def each(table):
    return pytest.mark.parametrize("schedule", table.values(), ids=table.keys())


@each(COSINES)
def test_cosine_preserves_the_variance(schedule):
    coeffs = schedule(jnp.linspace(0.0, 1.0, 101))
    np.testing.assert_allclose(coeffs.alpha**2 + coeffs.sigma**2, 1.0, rtol=1e-6)


@each(EVERY)
def test_derivatives_are_those_of_the_levels(schedule):
    with jax.enable_x64(True):
        # Not at the ends, where some are infinite, nor on the grid of the discrete ones, where they jump.
        t = (jnp.round(jnp.linspace(12.0, 988.0, 21, dtype=jnp.float64)) + 0.37) / 1000.0
        coeffs, speeds = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        h = 1e-6
        before, after = schedule(t - h), schedule(t + h)
        for name in ("alpha", "sigma"):
            slope = getattr(coeffs, f"d_{name}")
            np.testing.assert_allclose(slope, getattr(speeds, name), rtol=1e-9, atol=1e-12)
            central = (getattr(after, name) - getattr(before, name)) / (2.0 * h)
            np.testing.assert_allclose(slope, central, rtol=1e-4, atol=1e-8)


@each(EVERY)
def test_single_precision_loses_nothing_at_either_end(schedule):
    single = schedule(jnp.asarray(NEAR_ENDS))
    with jax.enable_x64(True):
        double = schedule(jnp.asarray(NEAR_ENDS, jnp.float64))
        level = logsnr(double)
    assert double.alpha.dtype == np.float64
    for name, low, high in zip(single._fields, single, double, strict=True):
        assert low.dtype == np.float32
        np.testing.assert_allclose(low, high, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(logsnr(single), level, rtol=1e-5, atol=1e-5)


@each(EVERY)
def test_the_inverse_of_log_snr_is_accurate_near_both_ends(schedule):
    t = np.array([1e-4, 1e-2, 0.5, 0.99, 1 - 1e-4], np.float32)
    with jax.enable_x64(True):
        level = np.asarray(logsnr(schedule(jnp.asarray(t, jnp.float64))))
        found = time_at(schedule, jnp.asarray(level))
        np.testing.assert_allclose(found, t, rtol=1e-9)
    low = time_at(schedule, jnp.asarray(level, jnp.float32))
    assert low.dtype == np.float32
    with jax.enable_x64(True):
        reached = np.asarray(logsnr(schedule(jnp.asarray(low, jnp.float64))))
    with jax.enable_x64(True):
        wide = jnp.asarray(t, jnp.float64)
        slope = np.abs(jax.jvp(lambda t: logsnr(schedule(t)), (wide,), (jnp.ones_like(wide),))[1])
    # What rounding the time alone costs, and a little.
    assert (np.abs(reached - level) < 1e-5 * (1.0 + np.abs(level)) + 1.2e-7 * t * slope).all()


@pytest.mark.parametrize("shift", [0.25, 1.0, 4.0])
def test_cosine_ends_where_it_is_told(shift):
    schedule = cosine(logsnr_min=-12.0, logsnr_max=9.0, shift=shift)
    ends = logsnr(schedule(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(ends, np.array([9.0, -12.0]) - 2.0 * math.log(shift), atol=2e-5)


def test_cosine_is_linear_in_the_angle():
    coeffs = cosine(logsnr_min=-100.0, logsnr_max=100.0)(jnp.linspace(0.0, 1.0, 9))
    np.testing.assert_allclose(coeffs.sigma, np.sin(np.linspace(0.0, np.pi / 2, 9)), atol=1e-6)


@each(SCHEDULES)
def test_the_noise_only_grows(schedule):
    t = jnp.linspace(0.0, 1.0, 1001)
    coeffs = schedule(t)
    assert (jnp.diff(logsnr(coeffs)) < 0.0).all()
    assert (coeffs.d_alpha < 0.0).all()
    assert (coeffs.d_sigma > 0.0).all()


@pytest.mark.parametrize("shift", [0.25, 4.0])
def test_shift_multiplies_the_ratio_of_noise_to_signal(shift):
    t = jnp.asarray(NEAR_ENDS)
    plain, shifted = cosine()(t), cosine(shift=shift)(t)
    np.testing.assert_allclose(shifted.sigma / shifted.alpha, shift * plain.sigma / plain.alpha, rtol=1e-5)


def test_the_flow_is_a_straight_line():
    t = jnp.linspace(0.0, 1.0, 11)
    coeffs = linear_flow(sigma_min=0.01)(t)
    np.testing.assert_allclose(coeffs.sigma, 0.01 + 0.98 * t, rtol=1e-6)
    np.testing.assert_allclose(coeffs.alpha + coeffs.sigma, 1.0, rtol=1e-6)
    np.testing.assert_allclose(coeffs.d_sigma, 0.98, rtol=1e-6)
    np.testing.assert_allclose(coeffs.d_alpha, -0.98, rtol=1e-6)


def test_ends_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"logsnr_min 3\.0 must be below logsnr_max 3\.0"):
        cosine(logsnr_min=3.0, logsnr_max=3.0)


def test_corrupt_takes_each_example_at_its_own_time():
    x0, eps = jnp.full((2, 3, 1), 2.0), jnp.full((2, 3, 1), -1.0)
    x = schedules.corrupt(linear_flow(sigma_min=0.0), x0, eps, jnp.array([0.25, 1.0]))
    np.testing.assert_allclose(x, np.broadcast_to(np.array([1.25, -1.0])[:, None, None], (2, 3, 1)))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine", cosine(logsnr_min=-100.0, logsnr_max=100.0)), ("linear", linear_flow(sigma_min=0.0))],
)
def test_schedules_agree_with_flow_matching(name, schedule):
    coeffs = schedule(1.0 - GOLDEN["flow_matching/t"])  # time runs the other way there
    for field, sign in (("alpha", 1.0), ("sigma", 1.0), ("d_alpha", -1.0), ("d_sigma", -1.0)):
        theirs = GOLDEN[f"flow_matching/{name}/{field}"]
        np.testing.assert_allclose(getattr(coeffs, field), sign * theirs, rtol=1e-5, atol=1e-6)


def imagen_cosine():
    """imagen-pytorch's cosine: the angle begins at 0.008 / 1.008 of a right angle."""
    first = math.tan(0.008 / 1.008 * math.pi / 2.0)
    return cosine(logsnr_min=-100.0, logsnr_max=-2.0 * math.log(first))


def test_cosine_agrees_with_imagen_pytorch():
    coeffs = imagen_cosine()(jnp.asarray(GOLDEN["imagen/cosine/t"]))
    np.testing.assert_allclose(logsnr(coeffs), GOLDEN["imagen/cosine/logsnr"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(coeffs.alpha, GOLDEN["imagen/cosine/alpha"], rtol=1e-5)
    np.testing.assert_allclose(coeffs.sigma, GOLDEN["imagen/cosine/sigma"], rtol=1e-5)
