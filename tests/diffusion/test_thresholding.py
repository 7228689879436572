from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import cosine, expand
from diffjax.diffusion.thresholding import THRESHOLDS, dynamic, none, static, thresholded

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
DARK = np.linspace(-0.9, 0.9, 48).reshape(4, 4, 3).astype(np.float32)
BRIGHT = 10.0 * DARK


def test_the_percentile_is_taken_of_each_image():
    both = dynamic(percentile=0.9)(jnp.stack([DARK, BRIGHT]))
    np.testing.assert_array_equal(both[0], DARK)  # a bright neighbour changes nothing
    np.testing.assert_array_equal(both[1], dynamic(percentile=0.9)(jnp.asarray(BRIGHT)[None])[0])
    bound = np.quantile(np.abs(BRIGHT), 0.9)
    np.testing.assert_allclose(both[1], np.clip(BRIGHT, -bound, bound) / bound, atol=1e-6)
    assert bound > 5.0


def test_a_maximal_value_bounds_the_threshold():
    limited = dynamic(percentile=0.9, max_value=1.5)(jnp.stack([DARK, BRIGHT]))
    np.testing.assert_array_equal(limited[0], DARK)
    np.testing.assert_allclose(limited[1], np.clip(BRIGHT, -1.5, 1.5) / 1.5, atol=1e-6)


@pytest.mark.parametrize("percentile", [0.9, 0.995])
def test_dynamic_thresholding_agrees_with_imagen_pytorch(percentile):
    images = GOLDEN["imagen/dynamic/images"]
    theirs = GOLDEN[f"imagen/dynamic/{percentile}"]
    np.testing.assert_allclose(dynamic(percentile=percentile)(images), theirs, atol=1e-6)


def test_static_and_none():
    images = jnp.array([[-3.0, 0.25, 1.5]])
    np.testing.assert_array_equal(static()(images), [[-1.0, 0.25, 1.0]])
    np.testing.assert_array_equal(none()(images), images)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_noise_agrees_with_the_thresholded_data(name):
    schedule, t = cosine(), jnp.array([0.1, 0.5])
    x = jnp.stack([DARK, BRIGHT])
    wide = expand(schedule(t), x)

    def denoise(x, t):
        x0 = 2.0 * x
        return Estimate(x0, (x - wide.alpha * x0) / wide.sigma)

    estimate = thresholded(denoise, schedule, THRESHOLDS[name]())(x, t)
    np.testing.assert_array_equal(estimate.x0, THRESHOLDS[name]()(2.0 * x))
    np.testing.assert_allclose(wide.alpha * estimate.x0 + wide.sigma * estimate.eps, x, atol=2e-6)
    changed = float(jnp.abs(estimate.eps - denoise(x, t).eps).max()) > 1e-3
    assert changed == (name != "none")
