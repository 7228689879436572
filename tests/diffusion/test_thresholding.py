from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import cosine, expand, trigonometric
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


def test_what_was_made_inconsistent_stays_so():
    """CFG++ pairs a guided x0 with another noise; eps moves only by what the threshold moves x0."""
    schedule, t = cosine(), jnp.array([0.1, 0.5])
    x, wide = jnp.stack([DARK, BRIGHT]), expand(schedule(t), BRIGHT[None])
    estimate = thresholded(lambda x, t: Estimate(2.0 * x, 0.3 * x), schedule, static())(x, t)
    before = wide.alpha * 2.0 * x + wide.sigma * 0.3 * x
    np.testing.assert_allclose(
        wide.alpha * estimate.x0 + wide.sigma * estimate.eps, before, rtol=1e-5, atol=1e-5
    )
    inside = np.abs(2.0 * x) <= 1.0
    np.testing.assert_array_equal(estimate.eps[inside], (0.3 * x)[inside])


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_learned_variance_is_kept(name):
    x, t = jnp.stack([DARK, BRIGHT]), jnp.array([0.1, 0.5])
    denoise = thresholded(lambda x, t: Estimate(x, x, 0.5 * x), cosine(), THRESHOLDS[name]())
    np.testing.assert_array_equal(denoise(x, t).fraction, 0.5 * x)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_it_is_finite_without_noise(name):
    x = jnp.stack([DARK, BRIGHT])
    estimate = thresholded(lambda x, t: Estimate(x, x), trigonometric(), THRESHOLDS[name]())(x, jnp.zeros(2))
    np.testing.assert_array_equal(estimate.x0, THRESHOLDS[name]()(x))
    np.testing.assert_array_equal(estimate.eps, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 0.0}, r"percentile is 0.0; expected a number in \(0, 1\]"),
        ({"percentile": 99.5}, r"percentile is 99.5; expected a number in \(0, 1\]"),
        ({"max_value": 0.5}, "max_value is 0.5; expected at least 1, or None"),
    ],
)
def test_a_bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dynamic(**settings)
