import math

import jax
import numpy as np
import pytest
from oracle import gaussian_denoiser
from scipy.stats import norm

from diffjax.diffusion.grids import uniform_logsnr
from diffjax.diffusion.schedules import cosine, linear_flow, logsnr
from diffjax.errors import UserError
from diffjax.evaluation.density import bits_per_dimension, denoising_error, level_times, over_examples

MEAN, STD = -0.2, 0.3
LEVELS = (-6.0, -1.0, 0.0, 3.0)


def images(count, side=16):
    x = np.random.default_rng(0).normal(MEAN, STD, (count, side, side, 3))
    return np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("schedule", [cosine(), linear_flow()])
def test_the_error_of_a_perfect_denoiser_is_the_posterior_variance(schedule):
    x0 = np.random.default_rng(1).normal(MEAN, STD, (64, 8, 8, 3)).astype(np.float32)
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    keys = jax.random.split(jax.random.key(0), 64)
    found = jax.jit(lambda x0: denoising_error(denoise, schedule, x0, keys=keys, levels=LEVELS))(x0)
    snr = np.exp(LEVELS)
    expected = STD**2 / (1.0 + snr * STD**2)  # 1 / (1 / STD^2 + snr)
    np.testing.assert_allclose(np.asarray(found).mean(axis=1), expected, rtol=0.05)
    assert found.shape == (4, 64)
    assert np.std(np.asarray(found), axis=1).min() > 0.0


def test_levels_beyond_the_schedule_are_refused():
    schedule = cosine()
    np.testing.assert_allclose(logsnr(schedule(level_times(schedule, LEVELS))), LEVELS, atol=1e-3)
    with pytest.raises(UserError, match="log-SNR 40 is beyond the schedule, which goes from"):
        level_times(schedule, [0.0, 40.0])


def test_bits_of_gaussian_pictures():
    """The noise that makes them continuous adds 1/12 to the squares, in grey levels."""
    schedule, pictures = cosine(), images(6)
    pictures[3:] = np.minimum(pictures[3:], 195) + 60  # unlikely ones, where half a grey level would show
    times = uniform_logsnr(limit=12.0)(schedule, 24)
    keys = jax.random.split(jax.random.key(0), 6)
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    found = jax.jit(lambda x: bits_per_dimension(denoise, schedule, x, keys=keys, times=times))(pictures)
    grey, width = (MEAN + 1.0) * 127.5, STD * 127.5
    nats = -norm(grey, width).logpdf(pictures) + 1.0 / (24.0 * width**2)
    np.testing.assert_allclose(found, nats.mean(axis=(1, 2, 3)) / math.log(2.0), atol=4e-3)


def test_batches_do_not_show():
    """Every example has its own key, and what fills up the last batch is left out."""
    rows = {"x": np.arange(10.0, dtype=np.float32)}
    sizes = []

    def measure(batch, keys):
        sizes.append(len(batch["x"]))
        draws = jax.vmap(jax.random.uniform)(keys)
        return jax.numpy.stack([batch["x"], draws])

    whole = over_examples(measure, [rows], seed=3)
    parts = over_examples(measure, [{"x": rows["x"][i : i + 4]} for i in (0, 4, 8)], seed=3)
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole[0], rows["x"])
    assert len(np.unique(whole[1])) == 10
    assert sizes == [10, 4, 4, 4]
    assert (over_examples(measure, [rows], seed=4)[1] != whole[1]).all()
