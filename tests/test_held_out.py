import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import predictions, timesteps, weightings
from diffjax.diffusion.schedules import cosine
from diffjax.errors import UserError
from diffjax.held_out import bits_per_dimension, denoiser_of, denoising_error
from diffjax.stage import Stage

MEAN, STD = 0.1, 0.25


def perfect(std, x, level, cond, dropout_key=None):
    """What a perfect network predicts as v where every pixel is N(MEAN, std^2); it is told log-SNR."""
    wide = level[:, None, None, None]
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(wide)), jnp.sqrt(jax.nn.sigmoid(-wide))
    centred = (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)
    return alpha * sigma * centred - sigma * (MEAN + alpha * std**2 * centred)


def stage_of(**changes):
    values = {
        "net": perfect,
        "schedule": cosine(),
        "prediction": predictions.v,
        "target": predictions.v,
        "weighting": weightings.unit(),
        "times": timesteps.stratified(),
        "resolution": 8,
        "conditions": (),
    }
    return Stage(**values | changes)


def batches(count=40, size=16):
    x = np.random.default_rng(0).normal(MEAN, STD, (count, 8, 8, 3))
    pixels = np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return [{"image": pixels[i : i + size]} for i in range(0, count, size)]


def test_errors_of_a_perfect_network():
    found = denoising_error(stage_of(), STD, batches(), levels=(-4.0, 0.0, 4.0))
    for level, (value, error) in found.items():
        expected = 1.0 / (1.0 / STD**2 + math.exp(level))
        assert 0.0 < error < 0.05 * expected
        assert abs(value - expected) < 4.0 * error
    worse = denoising_error(stage_of(), 2.0 * STD, batches(), levels=(0.0,))
    assert worse[0.0].value > 1.05 * found[0.0].value


def test_bits_of_a_perfect_network():
    value, error = bits_per_dimension(stage_of(), STD, batches())
    expected = 0.5 * math.log2(2.0 * math.pi * math.e * (STD * 127.5) ** 2)
    assert abs(value - expected) < 4.0 * error < 0.1
    assert bits_per_dimension(stage_of(), 1.5 * STD, batches()).value > value + 0.05


def test_super_resolution_sees_the_low_resolution_image():
    given = []

    def net(params, x, level, cond, dropout_key=None):
        given.append(cond)
        return perfect(params, x, level, cond)

    def inputs(coeffs, t):
        return jnp.ones_like(t), 1000.0 * t

    stage, images = stage_of(net=net, low_res=4, inputs=inputs), jnp.asarray(batches()[0]["image"])
    keys = jax.random.split(jax.random.key(0), len(images))
    for aug_level in (0.0, 0.5):
        denoise = denoiser_of(stage, STD, {"image": images}, keys, aug_level)
        denoise(jnp.zeros(images.shape), jnp.full(len(images), 0.5))
    small = images.reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4)) / 127.5 - 1.0
    clean = jax.image.resize(small, images.shape, "bilinear")
    np.testing.assert_allclose(given[0].low_res, clean, atol=0.02)
    assert np.std(given[1].low_res - clean) > 0.5
    np.testing.assert_array_equal([one.aug_level[0] for one in given], [0.0, 500.0])


def test_bits_of_latents_are_refused():
    with pytest.raises(UserError, match="this stage diffuses latents"):
        bits_per_dimension(stage_of(scale=8, resolution=64), STD, [])


def test_errors_of_latents_are_of_the_latents():
    latents = np.random.default_rng(1).normal(MEAN, STD, (32, 8, 8, 3)).astype(np.float32)
    found = denoising_error(stage_of(scale=8, resolution=64), STD, [{"latent": latents}], levels=(0.0,))
    assert found[0.0].value == pytest.approx(1.0 / (1.0 / STD**2 + 1.0), rel=0.05)
