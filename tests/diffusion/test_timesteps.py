import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.schedules import edm
from diffjax.diffusion.timesteps import (
    EDGE,
    TIMESTEPS,
    cosmap,
    dynamic_mu,
    log_normal_sigma,
    logit_normal,
    mode,
    shift_time,
    stratified,
    uniform,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "training_maths.npz")
COUNT = 20_000


def distance(samples, cdf):
    """The statistic of Kolmogorov and Smirnov."""
    ordered = np.sort(np.asarray(samples, np.float64))
    expected = cdf(ordered)
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(expected - ranks[1:]).max(), np.abs(expected - ranks[:-1]).max())


def normal_cdf(x):
    return np.asarray(jax.scipy.stats.norm.cdf(x))


def integral(density):
    """The distribution function of a density on [0, 1], by the trapezoidal rule."""
    t = np.linspace(0.0, 1.0, 20_001)
    values = density(t)
    sums = np.concatenate([[0.0], np.cumsum(0.5 * (values[1:] + values[:-1]) * np.diff(t))])
    np.testing.assert_allclose(sums[-1], 1.0, rtol=1e-4)
    return lambda x: np.interp(x, t, sums)


def logit_normal_density(mean, std):
    """Of the SD3 paper, with the ends left out."""

    def density(t):
        t = np.clip(t, 1e-9, 1.0 - 1e-9)
        logit = np.log(t / (1.0 - t))
        return np.exp(-(((logit - mean) / std) ** 2) / 2.0) / (std * (2.0 * np.pi) ** 0.5 * t * (1.0 - t))

    return density


def mode_cdf(scale):
    """The paper's function f, inverted on a grid: it falls, so that t <= x where u >= f^-1(x)."""
    u = np.linspace(1.0, 0.0, 200_001)
    t = 1.0 - u - scale * (np.cos(np.pi * u / 2.0) ** 2 - 1.0 + u)
    assert (np.diff(t) >= 0.0).all()
    return lambda x: 1.0 - np.interp(x, t, u)


def sigma_cdf(mean, std, sigma_max):
    return lambda t: normal_cdf((np.log(sigma_max * t) - mean) / std)


DISTRIBUTIONS = {
    "uniform": ({}, lambda t: t),
    "uniform of a part": ({"low": 0.2, "high": 0.7}, lambda t: (t - 0.2) / 0.5),
    "stratified": ({}, lambda t: t),
    "logit_normal": ({}, integral(logit_normal_density(0.0, 1.0))),
    "logit_normal of JiT": ({"mean": 0.8, "std": 0.8}, integral(logit_normal_density(0.8, 0.8))),
    # Three times the odds: the logit moves by log 3.
    "logit_normal shifted": ({"shift": 3.0}, integral(logit_normal_density(math.log(3.0), 1.0))),
    "mode": ({}, mode_cdf(1.29)),
    "mode of the ends": ({"scale": -0.5}, mode_cdf(-0.5)),
    "cosmap": ({}, integral(lambda t: 2.0 / (np.pi - 2.0 * np.pi * t + 2.0 * np.pi * t**2))),
    "log_normal_sigma": ({}, sigma_cdf(-1.2, 1.2, 80.0)),
    "log_normal_sigma of EDM2": ({"mean": -0.4, "std": 1.0}, sigma_cdf(-0.4, 1.0, 80.0)),
}


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_times_follow_the_published_distribution(case):
    settings, cdf = DISTRIBUTIONS[case]
    name = case.split()[0]
    plain = TIMESTEPS["uniform" if name == "stratified" else name](**settings)
    even = TIMESTEPS[name](**settings, **({} if name == "stratified" else {"stratified": True}))
    key = jax.random.key(0)
    independent, stratified = jax.jit(lambda key: (plain(key, COUNT), even(key, COUNT)))(key)
    assert distance(independent, cdf) < 1.6 / COUNT**0.5
    # One in each of n intervals: the empirical distribution is off by one example's share at most.
    assert distance(stratified, cdf) < 1.5 / COUNT


def test_every_sampler_has_its_distribution_tested():
    assert {case.split()[0] for case in DISTRIBUTIONS} == set(TIMESTEPS)


@pytest.mark.parametrize("name", TIMESTEPS)
def test_times_lie_inside_the_unit_interval_and_come_from_the_key(name):
    draw = jax.jit(TIMESTEPS[name](), static_argnums=1)
    for seed in range(3):
        t = draw(jax.random.key(seed), 999)
        assert t.shape == (999,)
        assert t.dtype == jnp.float32
        assert t.min() > 0.0
        assert t.max() < 1.0
        np.testing.assert_array_equal(t, draw(jax.random.key(seed), 999))
        assert not np.array_equal(t, draw(jax.random.key(seed + 100), 999))


@pytest.mark.parametrize("value", [0.0, 1.0 - 2.0**-24])
def test_the_extreme_uniform_numbers_give_times_inside(value, monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(): jnp.full(shape, value, jnp.float32))
    drawn = jax.jit(lambda key: {name: sampler()(key, 1) for name, sampler in TIMESTEPS.items()})
    for name, t in drawn(jax.random.key(0)).items():
        assert 0.0 < float(t[0]) < 1.0, name


def test_sigma_is_at_most_the_largest():
    sigma = edm()(jax.jit(log_normal_sigma(mean=5.0), static_argnums=1)(jax.random.key(0), 1000)).sigma
    assert float(sigma.max()) == pytest.approx(80.0 * (1.0 - EDGE))
    assert 0.5 < float((sigma > 79.0).mean()) < 0.9  # P(N(5, 1.2) > ln 80) = 0.70


@pytest.mark.parametrize("sampler", [uniform, stratified])
def test_a_grid_has_the_times_of_a_discrete_process(sampler):
    t = np.asarray(sampler(grid=10)(jax.random.key(0), 50_000), np.float64)
    steps = np.rint(t * 10).astype(int)
    np.testing.assert_allclose(t, steps / 10, rtol=1e-6)
    shares = np.bincount(steps, minlength=11) / len(t)
    assert shares[0] == 0.0
    np.testing.assert_allclose(shares[1:], 0.1, atol=0.006)
    part = sampler(grid=10, low=0.25, high=0.6)(jax.random.key(0), 1000)
    np.testing.assert_allclose(np.unique(part), [0.3, 0.4, 0.5, 0.6], rtol=1e-6)


def test_a_grid_of_a_thousand_steps_is_complete():
    t = stratified(grid=1000)(jax.random.key(0), 1000)
    np.testing.assert_array_equal(np.unique(np.rint(np.asarray(t, np.float64) * 1000)), np.arange(1, 1001))


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


def test_mode_is_the_function_of_diffusers(monkeypatch):
    u = jnp.asarray(GOLDEN["mode/u"])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: u)
    np.testing.assert_allclose(mode()(jax.random.key(0), len(u)), GOLDEN["mode/t"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler"), [("mode", mode()), ("logit_normal", logit_normal(mean=0.3, std=0.7))]
)
def test_times_are_distributed_as_those_of_diffusers(name, sampler):
    theirs = np.sort(GOLDEN[f"density/{name}"])
    ours = np.sort(sampler(jax.random.key(0), 20_000))
    grid = np.linspace(0.0, 1.0, 1001)
    gap = np.searchsorted(theirs, grid) / len(theirs) - np.searchsorted(ours, grid) / len(ours)
    assert np.abs(gap).max() < 1.6 * (1 / len(theirs) + 1 / len(ours)) ** 0.5


def test_fluxs_shift_is_that_of_diffusers():
    mu = [dynamic_mu(int(tokens)) for tokens in GOLDEN["flux/tokens"]]
    np.testing.assert_allclose(mu, GOLDEN["flux/mu"], rtol=1e-12)


def test_a_shift_multiplies_the_odds():
    t = jnp.linspace(0.01, 0.99, 9)
    moved = shift_time(t, 3.0)
    np.testing.assert_allclose(moved / (1.0 - moved), 3.0 * t / (1.0 - t), rtol=1e-5)
    np.testing.assert_allclose(shift_time(jnp.array([0.0, 1.0]), 3.0), [0.0, 1.0])
    np.testing.assert_allclose(shift_time(moved, 1.0 / 3.0), t, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (uniform, {"low": 0.5, "high": 0.5}),
        (uniform, {"high": 1.5}),
        (uniform, {"grid": -1}),
        (stratified, {"low": -0.1}),
        (logit_normal, {"std": 0.0}),
        (logit_normal, {"shift": 0.0}),
        (mode, {"scale": 2.0}),
        (cosmap, {"shift": -1.0}),
        (log_normal_sigma, {"sigma_max": 0.0}),
    ],
)
def test_impossible_settings_are_refused(sampler, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*expected"):
        sampler(**settings)
