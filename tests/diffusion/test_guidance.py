import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser

from diffjax.diffusion.guidance import classifier_free
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import cosine, expand

SCHEDULE = cosine()
X = jnp.linspace(-2.0, 2.0, 12).reshape(3, 4)
T = jnp.array([0.2, 0.5, 0.9])
COND, NULL = {"shift": jnp.array([1.0, 2.0, 3.0])}, {"shift": jnp.array([-1.0, 0.0, 0.5])}


def spy():
    """A denoiser bound to a condition, and the batches that it was evaluated with."""
    seen = []

    def denoiser_of(cond):
        def denoise(x, t):
            seen.append(x.shape)
            shifted = jnp.tanh(x) + cond["shift"][:, None] * t[:, None]
            return Estimate(shifted, 2.0 * shifted - x)

        return denoise

    return denoiser_of, seen


def test_a_scale_of_one_is_no_guidance_and_one_pass():
    denoiser_of, seen = spy()
    guided = classifier_free(denoiser_of, COND, NULL, 1.0)(X, T)
    assert seen == [(3, 4)]
    for part, plain in zip(guided[:2], denoiser_of(COND)(X, T)[:2], strict=True):
        np.testing.assert_array_equal(part, plain)


def test_a_scale_of_zero_is_unconditional():
    denoiser_of, _ = spy()
    for part, plain in zip(
        classifier_free(denoiser_of, COND, NULL, 0.0)(X, T)[:2], denoiser_of(NULL)(X, T)[:2], strict=True
    ):
        np.testing.assert_allclose(part, plain, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_the_null_condition(scale):
    denoiser_of, seen = spy()
    guided = classifier_free(denoiser_of, COND, NULL, scale)(X, T)
    assert seen == [(6, 4)]  # one evaluation, of both
    pairs = zip(guided[:2], denoiser_of(COND)(X, T)[:2], denoiser_of(NULL)(X, T)[:2], strict=True)
    for part, with_cond, without in pairs:
        np.testing.assert_allclose(part, (1.0 - scale) * without + scale * with_cond, atol=2e-5)


def test_guided_gaussians_are_those_of_the_tilted_density():
    # p(x|c) = N(1, 1), p(x) = N(-0.5, 1): p(x) (p(x|c) / p(x))^w is N(-0.5 + 1.5 w, 1) at every noise level.
    scale = 3.0

    def denoiser_of(mean):
        def denoise(x, t):
            offset = x - expand(SCHEDULE(t), x).alpha * mean[:, None]
            at_zero = gaussian_denoiser(SCHEDULE, 0.0, 1.0)(offset, t)
            return Estimate(at_zero.x0 + mean[:, None], at_zero.eps)

        return denoise

    guided = classifier_free(denoiser_of, jnp.full((3,), 1.0), jnp.full((3,), -0.5), scale)(X, T)
    tilted = gaussian_denoiser(SCHEDULE, -0.5 + 1.5 * scale, 1.0)(X, T)
    np.testing.assert_allclose(guided.x0, tilted.x0, atol=2e-5)
    np.testing.assert_allclose(guided.eps, tilted.eps, atol=2e-5)


def test_guidance_works_under_jit():
    denoiser_of, _ = spy()
    jitted = jax.jit(lambda cond, null, x, t: classifier_free(denoiser_of, cond, null, 2.0)(x, t))
    np.testing.assert_allclose(
        jitted(COND, NULL, X, T).x0, classifier_free(denoiser_of, COND, NULL, 2.0)(X, T).x0, atol=1e-5
    )
