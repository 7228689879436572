import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import stage as stages
from diffjax.diffusion import predictions, resizing, thresholding, timesteps, weightings
from diffjax.diffusion.schedules import cosine, logsnr
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.nn.conditioning import Cond
from diffjax.stage import SamplerSettings, Stage

SCHEDULE = cosine()


class Spy:
    """A network that remembers its last inputs."""

    def __call__(self, params, x, level, cond, dropout_key=None):
        self.x, self.level, self.cond, self.dropout_key = x, level, cond, dropout_key
        return params * x


def stage_of(net, **changes):
    values = {
        "net": net,
        "schedule": SCHEDULE,
        "prediction": predictions.v,
        "target": predictions.v,
        "weighting": weightings.unit(),
        "times": timesteps.stratified(),
        "resolution": 16,
        "low_res": 4,
        "drop_cond": 0.0,
    }
    return Stage(**values | changes)


def batch(count=8, size=16, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(random.integers(0, 256, (count, size, size, 3)), jnp.uint8),
        "text": jnp.asarray(random.normal(size=(count, 3, 5)), jnp.float16),
        "mask": jnp.asarray([[True, True, False]] * count),
        "pooled": jnp.asarray(random.normal(size=(count, 5)), jnp.float32),
    }


@functools.cache
def spied(seed=0, count=8, size=16, **changes):
    """The loss, the spy that stood in for the network, and the batch."""
    spy = Spy()
    data = batch(count, size)

    @jax.jit
    def run(data, key):
        stage = stage_of(spy, **changes)
        loss = stages.loss(stage, jnp.float32(0.5), *stages.draw(stage, data, key))
        return loss.loss, vars(spy)

    loss, seen = run(data, jax.random.key(seed))
    vars(spy).update(seen)
    return loss, spy, data


def levels(level):
    """alpha and sigma of a log-SNR under a variance-preserving schedule, to broadcast over images."""
    level = np.asarray(level, np.float64)[:, None, None, None]
    return np.sqrt(1.0 / (1.0 + np.exp(-level))), np.sqrt(1.0 / (1.0 + np.exp(level)))


def times_of(level):
    """The times of a log-SNR under the cosine schedule."""
    start, end = (math.atan(math.exp(-bound / 2.0)) for bound in (15.0, -15.0))
    return (np.arctan(np.exp(-np.asarray(level, np.float64) / 2.0)) - start) / (end - start)


def clean_low_res(data):
    real = np.asarray(data["image"], np.float32) / 127.5 - 1.0
    count, size = real.shape[:2]
    small = real.reshape(count, size // 4, 4, size // 4, 4, 3).mean(axis=(2, 4))
    return np.asarray(resizing.upsample(jnp.asarray(small), 4))


def test_the_noised_low_resolution_image_is_what_reaches_the_network():
    _, spy, data = spied()
    clean, given = clean_low_res(data), np.asarray(spy.cond.low_res)
    assert given.shape == (8, 16, 16, 3)
    alpha, sigma = levels(spy.cond.aug_level)
    noise = (given - alpha * clean) / sigma
    assert sigma.max() > 0.5
    assert (np.abs(given - clean).max(axis=(1, 2, 3)) > 0.5 * sigma.ravel()).all()  # none is the clean one
    np.testing.assert_allclose(noise.mean(), 0.0, atol=0.05)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 1.0, atol=0.1)
    assert np.abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < 0.2


def test_the_noise_of_the_low_resolution_image_is_not_that_of_the_target():
    _, spy, data = spied()
    alpha, sigma = levels(spy.cond.aug_level)
    on_low_res = (np.asarray(spy.cond.low_res) - alpha * clean_low_res(data)) / sigma
    alpha, sigma = levels(spy.level)
    x0 = np.asarray(data["image"], np.float32) / 127.5 - 1.0
    on_target = (np.asarray(spy.x) - alpha * x0) / sigma
    np.testing.assert_allclose(on_target.std(), 1.0, atol=0.05)
    assert abs(np.corrcoef(on_low_res.ravel(), on_target.ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(times_of(spy.cond.aug_level), times_of(spy.level))[0, 1]) < 0.9


def test_another_key_draws_other_noise_and_other_levels():
    first, second = spied(0)[1], spied(1)[1]
    assert float(jnp.abs(first.cond.low_res - second.cond.low_res).max()) > 0.1
    assert float(jnp.abs(first.cond.aug_level - second.cond.aug_level).min()) > 0.0
    np.testing.assert_array_equal(first.cond.low_res, spied(0)[1].cond.low_res)


@pytest.mark.parametrize("bound", [0.0, 0.3, 1.0])
def test_training_draws_levels_up_to_the_bound(bound):
    _, spy, _ = spied(count=400, size=4, resolution=4, low_res=1, max_aug_level=bound)
    drawn = times_of(spy.cond.aug_level)
    assert drawn.min() >= -1e-6
    assert drawn.max() <= bound + 1e-6
    np.testing.assert_allclose(drawn.mean(), bound / 2.0, atol=0.05)
    np.testing.assert_allclose(drawn.max(), bound, atol=0.02)


def test_with_low_res_follows_its_formula():
    random = np.random.default_rng(0)
    image, eps = (jnp.asarray(random.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    level = jnp.array([0.2, 0.7])
    text = Cond(jnp.zeros((2, 1, 1)), jnp.ones((2, 1), bool), jnp.zeros((2, 1)))
    cond = stages.with_low_res(text, SCHEDULE, image, level, eps)
    coeffs = SCHEDULE(level)
    expected = coeffs.alpha[:, None, None, None] * image + coeffs.sigma[:, None, None, None] * eps
    np.testing.assert_allclose(cond.low_res, expected, rtol=1e-6)
    np.testing.assert_array_equal(cond.aug_level, logsnr(coeffs))
    assert cond.text is text.text


def test_a_base_stage_has_no_low_resolution_image():
    _, spy, _ = spied(low_res=0)
    assert spy.cond.low_res is None
    assert spy.cond.aug_level is None


def test_text_reaches_the_network_and_is_dropped_at_its_rate():
    _, spy, data = spied(drop_cond=0.0)
    np.testing.assert_array_equal(spy.cond.mask, data["mask"])
    np.testing.assert_array_equal(spy.cond.text, data["text"].astype(jnp.float32))
    np.testing.assert_array_equal(spy.cond.pooled, data["pooled"])
    _, spy, _ = spied(drop_cond=1.0)
    assert not spy.cond.mask.any()  # the null condition
    count = 2000
    _, spy, _ = spied(count=count, size=4, resolution=4, low_res=1, drop_cond=0.2)
    kept = np.asarray(spy.cond.mask)
    np.testing.assert_array_equal(kept[:, 0], kept[:, 1])  # all of a text or none
    assert abs((1.0 - kept[:, 0].mean()) - 0.2) < 4.0 * (0.16 / count) ** 0.5


def test_the_loss_is_that_of_the_given_images():
    loss, spy, data = spied()
    x0 = np.asarray(data["image"], np.float32) / 127.5 - 1.0
    alpha, sigma = levels(spy.level)
    eps = (np.asarray(spy.x) - alpha * x0) / sigma
    expected = ((0.5 * np.asarray(spy.x) - (alpha * eps - sigma * x0)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert loss.shape == (8,)
    strata = np.floor(8.0 * times_of(spy.level))
    np.testing.assert_array_equal(np.sort(strata), np.arange(8))  # by the stage's own time sampler


def test_crops_are_trained_at_their_own_size():
    loss, spy, data = spied(size=8, max_aug_level=0.0)
    assert loss.shape == (8,)
    assert spy.x.shape == spy.cond.low_res.shape == (8, 8, 8, 3)
    # The factor is the stage's, 4, whatever the size; at level 0 there is almost no noise.
    np.testing.assert_allclose(spy.cond.low_res, clean_low_res(data), atol=4e-3)


def test_the_dropout_key_is_given_in_training_only():
    _, spy, _ = spied()
    assert spy.dropout_key is not None
    spy = Spy()
    stage, settings = stage_of(spy), settings_of(num_steps=1, guidance_scale=2.0)
    stages.sample(stage, settings, jnp.float32(0.5), text_cond(2), keys_of(2), jnp.zeros((2, 4, 4, 3)))
    assert spy.dropout_key is None


def settings_of(**changes):
    values = {
        "solver": ddpm(),  # whose last step returns the estimate, without the little noise of t = 0
        "num_steps": 3,
        "guidance_scale": 1.0,
        "threshold": thresholding.none(),
    }
    return SamplerSettings(**values | changes)


def text_cond(count, mask=True):
    return Cond(jnp.ones((count, 3, 5)), jnp.full((count, 3), mask), jnp.ones((count, 5)))


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def shown(show, settings, *, count=4, low_res=None, **changes):
    """Sample a stage whose network predicts `show(cond)` as the data, so that the result is that."""
    net = lambda params, x, level, cond: jnp.broadcast_to(show(cond), x.shape)  # noqa: E731
    stage = stage_of(net, prediction=predictions.x0, **changes)
    return jax.jit(lambda keys: stages.sample(stage, settings, None, text_cond(count), keys, low_res))(
        keys_of(count)
    )


def wide(vector):
    return vector[:, None, None, None]


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8])
def test_sampling_noises_the_low_resolution_image_by_its_level(level):
    low_res = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (4, 4, 4, 3)), jnp.float32)
    scale = 0.1  # the result is clipped to [-1, 1]
    given = shown(lambda cond: scale * cond.low_res, settings_of(aug_level=level), low_res=low_res) / scale
    coeffs = SCHEDULE(jnp.float32(level))
    clean = coeffs.alpha * resizing.upsample(low_res, 4)
    noise = (given - clean) / coeffs.sigma
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 1.0, atol=0.15 if level else 0.3)
    assert np.abs(np.corrcoef(np.asarray(noise).reshape(4, -1)) - np.eye(4)).max() < 0.2
    told = shown(lambda cond: wide(cond.aug_level) / 100.0, settings_of(aug_level=level), low_res=low_res)
    np.testing.assert_allclose(told, logsnr(coeffs) / 100.0, atol=1e-4)


def test_the_noise_on_the_low_resolution_image_is_that_of_the_key():
    low_res = jnp.zeros((4, 4, 4, 3))
    settings = settings_of(aug_level=0.5)
    together = shown(lambda cond: 0.2 * cond.low_res, settings, low_res=low_res)
    alone = shown(lambda cond: 0.2 * cond.low_res, settings, count=4, low_res=low_res)
    np.testing.assert_array_equal(together, alone)
    # The first noise of the trajectory is another: the two would cancel or double otherwise.
    start = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys_of(4))
    first = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (16, 16, 3)))(start)
    assert abs(np.corrcoef(np.asarray(together).ravel(), np.asarray(first).ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_pushes_from_the_null_condition_to_the_text(scale):
    def show(cond):
        return wide(jnp.where(cond.mask.any(axis=1), 0.2, 0.1))

    images = shown(show, settings_of(guidance_scale=scale), low_res=jnp.zeros((4, 4, 4, 3)))
    np.testing.assert_allclose(images, 0.1 + scale * 0.1, atol=1e-5)


def test_both_passes_of_guidance_see_the_same_low_resolution_image():
    def show(cond):  # what differs between the passes
        return 0.1 * cond.low_res

    low_res = jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, (4, 4, 4, 3)), jnp.float32)
    plain = shown(show, settings_of(aug_level=0.4), low_res=low_res)
    guided = shown(show, settings_of(aug_level=0.4, guidance_scale=5.0), low_res=low_res)
    np.testing.assert_allclose(guided, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (thresholding.none(), [1.0, 0.6, -1.0]),
        (thresholding.dynamic(), [1.0, 0.2, -1.0]),
        (thresholding.dynamic(max_value=1.5), [1.0, 0.4, -1.0]),
    ],
)
def test_images_are_thresholded_and_clipped(threshold, expected):
    images = shown(
        lambda cond: jnp.array([3.0, 0.6, -3.0]),
        settings_of(threshold=threshold),
        low_res=jnp.zeros((4, 4, 4, 3)),
    )
    np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), atol=1e-5)
    assert images.dtype == jnp.float32


@pytest.mark.parametrize("solver", [ddim(), ddpm()])
def test_an_image_does_not_depend_on_its_batch(solver):
    stage = stage_of(lambda params, x, level, cond: 0.3 * x + 0.2 * cond.low_res)
    settings = settings_of(solver=solver, guidance_scale=2.0, aug_level=0.5)
    low_res = jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, (4, 4, 4, 3)), jnp.float32)
    run = jax.jit(lambda cond, keys, low_res: stages.sample(stage, settings, None, cond, keys, low_res))
    together = run(text_cond(4), keys_of(4), low_res)
    np.testing.assert_allclose(run(text_cond(1), keys_of(4)[2:3], low_res[2:3])[0], together[2], atol=1e-5)


def test_pixels_survive_the_way_to_the_models_range_and_back():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    floats = stages.to_model_range(pixels)
    assert floats.dtype == jnp.float32
    assert (float(floats.min()), float(floats.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(stages.to_pixels(floats), pixels)
    np.testing.assert_array_equal(stages.to_pixels(jnp.array([-9.0, 9.0])), [0, 255])
    # To the nearest, not down.
    np.testing.assert_array_equal(stages.to_pixels(floats[1:-1] + 0.4 / 127.5), pixels[1:-1])
    np.testing.assert_array_equal(stages.to_pixels(floats[1:-1] - 0.4 / 127.5), pixels[1:-1])


def test_downsampling_is_the_mean_over_boxes():
    image = jnp.arange(2 * 4 * 6 * 1, dtype=jnp.float32).reshape(2, 4, 6, 1)
    small = resizing.downsample(image, 2)
    assert small.shape == (2, 2, 3, 1)
    np.testing.assert_allclose(small[0, 0, 0, 0], (0 + 1 + 6 + 7) / 4)
    np.testing.assert_allclose(small[1, 1, 2, 0], np.asarray(image)[1, 2:, 4:].mean())
    np.testing.assert_allclose(small.mean(), image.mean())


@pytest.mark.parametrize("factor", [2, 4])
def test_upsampling_keeps_constants_means_and_smooth_pictures(factor):
    x = np.linspace(0.0, 1.0, 8)
    smooth = jnp.asarray(np.sin(3.0 * x)[:, None, None] + x[None, :, None], jnp.float32)[None]
    large = resizing.upsample(smooth, factor)
    assert large.shape == (1, 8 * factor, 8 * factor, 1)
    np.testing.assert_allclose(resizing.downsample(large, factor), smooth, atol=0.1)
    np.testing.assert_allclose(large.mean(), smooth.mean(), atol=1e-2)
    np.testing.assert_allclose(resizing.upsample(jnp.full((1, 3, 3, 2), 0.7), factor), 0.7, rtol=1e-6)
    # A ramp stays a ramp: pixel centres are aligned.
    ramp = resizing.upsample(jnp.arange(8.0)[None, None, :, None], factor)[0, 0, factor:-factor, 0]
    centres = (np.arange(8 * factor) + 0.5) / factor - 0.5
    np.testing.assert_allclose(ramp, centres[factor:-factor], atol=1e-5)


def test_stages_can_be_keys_of_a_cache():
    stage = stage_of(Spy())
    assert hash(stage) == hash(dataclasses.replace(stage))
    assert stage != dataclasses.replace(stage, low_res=8)
