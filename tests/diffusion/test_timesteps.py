import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.timesteps import TIMESTEPS, logit_normal, stratified, uniform

COUNT = 20_000


def distance(samples, cdf):
    """The statistic of Kolmogorov and Smirnov."""
    ordered = np.sort(np.asarray(samples, np.float64))
    expected = cdf(ordered)
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(expected - ranks[1:]).max(), np.abs(expected - ranks[:-1]).max())


def normal_cdf(x):
    return np.asarray(jax.scipy.stats.norm.cdf(x))


@pytest.mark.parametrize("name", TIMESTEPS)
def test_times_lie_in_the_unit_interval_and_come_from_the_key(name):
    draw = TIMESTEPS[name]()
    for seed in range(5):
        t = draw(jax.random.key(seed), 999)
        assert t.shape == (999,)
        assert t.dtype == jnp.float32
        assert t.min() >= 0.0
        assert t.max() <= 1.0
        np.testing.assert_array_equal(t, draw(jax.random.key(seed), 999))
        assert not np.array_equal(t, draw(jax.random.key(seed + 100), 999))


def test_uniform_times_are_uniform():
    assert distance(uniform()(jax.random.key(0), COUNT), lambda t: t) < 1.6 / COUNT**0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.8)])
def test_the_logits_of_logit_normal_times_are_normal(mean, std):
    t = np.asarray(logit_normal(mean=mean, std=std)(jax.random.key(0), COUNT), np.float64)
    logits = np.log(t) - np.log1p(-t)
    assert distance(logits, lambda x: normal_cdf((x - mean) / std)) < 1.6 / COUNT**0.5


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_stratified_times_have_one_in_each_interval(batch):
    for seed in range(20):
        t = np.asarray(stratified()(jax.random.key(seed), batch))
        np.testing.assert_array_equal(np.sort(np.floor(t * batch)), np.arange(batch))


@pytest.mark.parametrize("place", [0, 3])
def test_each_stratified_time_is_uniform_on_its_own(place):
    keys = jax.random.split(jax.random.key(1), COUNT)
    t = jax.jit(jax.vmap(lambda key: stratified()(key, 8)[place]))(keys)
    assert distance(t, lambda t: t) < 1.6 / COUNT**0.5
