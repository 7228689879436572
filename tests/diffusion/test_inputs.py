import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import predictions, weightings
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.inputs import INPUTS, edm_input, logsnr_input, time_input, timestep_input
from diffjax.diffusion.losses import denoising_loss
from diffjax.diffusion.schedules import cosine, ddpm, edm, linear_flow

T = jnp.array([0.001, 0.25, 0.5, 1.0])


def test_the_step_number_counts_from_zero():
    scale, told = timestep_input(num_steps=1000)(ddpm()(T), T)
    np.testing.assert_allclose(told, [0.0, 249.0, 499.0, 999.0], atol=1e-4)
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_allclose(timestep_input(num_steps=4)(ddpm()(T), T)[1], 4.0 * T - 1.0)


def test_time_is_told_as_it_is():
    scale, told = time_input()(linear_flow()(T), T)
    np.testing.assert_allclose(told, 1000.0 * T)
    np.testing.assert_allclose(time_input(scale=1.0)(linear_flow()(T), T)[1], T)
    np.testing.assert_array_equal(scale, 1.0)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_scales_to_unit_variance_and_tells_a_quarter_of_the_logarithm(sigma_data):
    """c_in and c_noise of Karras et al., table 1; under another schedule, of x / alpha."""
    scale, told = edm_input(sigma_data=sigma_data)(edm()(T), T)
    sigma = 80.0 * np.asarray(T)
    np.testing.assert_allclose(scale, 1.0 / np.sqrt(sigma**2 + sigma_data**2), rtol=1e-6)
    np.testing.assert_allclose(told, np.log(sigma) / 4.0, rtol=1e-5, atol=1e-6)
    coeffs = cosine()(T)
    scale, told = edm_input(sigma_data=sigma_data)(coeffs, T)
    np.testing.assert_allclose(scale, 1.0 / np.hypot(coeffs.alpha * sigma_data, coeffs.sigma), rtol=1e-6)
    np.testing.assert_allclose(told, np.log(coeffs.sigma / coeffs.alpha) / 4.0, rtol=1e-5, atol=1e-5)


def test_log_snr_is_clipped_where_a_schedule_has_exact_ends():
    ends = jnp.array([0.0, 0.5, 1.0])
    _, told = logsnr_input(limit=7.0)(linear_flow(sigma_min=0.0)(ends), ends)
    np.testing.assert_allclose(told, [7.0, 0.0, -7.0], atol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_the_network_sees_the_same_in_training_and_in_sampling(name):
    inputs, schedule, seen = INPUTS[name](), cosine(), []

    def net(x, told):
        seen.append((x, told))
        return x

    random = np.random.default_rng(0)
    x0, eps = (jnp.asarray(random.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    settings = {"prediction": predictions.v, "target": predictions.v, "weighting": weightings.unit()}
    denoising_loss(net, schedule, **settings, x0=x0, eps=eps, t=T, inputs=inputs)
    coeffs = schedule(T)
    x = coeffs.alpha[:, None] * x0 + coeffs.sigma[:, None] * eps
    make_denoiser(net, schedule, predictions.v, inputs)(x, T)
    scale, told = inputs(coeffs, T)
    for shown, level in seen:
        np.testing.assert_allclose(shown, scale[:, None] * x, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(level, told)
    assert len(seen) == 2
