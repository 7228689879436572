from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser, gaussian_flow, mixture_denoiser
from scipy.stats import norm

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.inputs import time_input
from diffjax.diffusion.learned_variance import gaussian_nll
from diffjax.diffusion.likelihood import (
    DIVERGENCES,
    bits_per_dim,
    exact,
    hutchinson,
    log_likelihood,
    variational_bound,
)
from diffjax.diffusion.predictions import Estimate, velocity
from diffjax.diffusion.schedules import betas, cosine, edm, expand, linear_flow, time_at, trigonometric, ve

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "likelihood.npz")
SCHEDULES = {
    "exact": trigonometric(),
    "flow": linear_flow(sigma_min=0.0),
    "betas": betas.ddpm(),
    "ve": ve(),
    "edm": edm(),
}
MEAN, STD = 0.3, 0.5

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def images(count=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(MEAN, STD, size=(count, 2, 1)), jnp.float32)


def even_times(schedule, steps, start=0.0):
    """Times at which the angle of noise to signal is equally spaced, whatever the schedule's own time is."""
    ends = schedule(jnp.asarray([start, 1.0]))
    angles = np.linspace(*np.arctan2(ends.sigma, ends.alpha), steps + 1)[1:-1]
    return np.concatenate([[start], time_at(schedule, -2.0 * np.log(np.tan(angles))), [1.0]])[::-1]


def likelihood(denoise, schedule, x0, times, divergence=None, seed=0, **options):
    keys, divergence = keys_of(len(x0), seed), divergence or exact()
    run = jax.jit(
        lambda x: log_likelihood(
            denoise, schedule, x, keys=keys, times=times, divergence=divergence, **options
        )
    )
    return np.asarray(run(x0))


@each_schedule
def test_gaussian_data(schedule):
    """The flow is affine, so Hutchinson's estimate is exact, and so is the density of what is generated."""
    x0, start, times = images(), schedule(jnp.zeros(())), even_times(schedule, 24)
    ends = [gaussian_flow(schedule, MEAN, STD, start.alpha * x, 0.0, 1.0) for x in (x0, x0 + 1.0)]
    stretch = np.log(np.float64(ends[1] - ends[0]))
    expected = norm.logpdf(ends[0], scale=schedule(jnp.ones(())).sigma) + stretch
    for divergence in DIVERGENCES.values() if schedule is SCHEDULES["exact"] else [exact]:
        found = likelihood(gaussian_denoiser(schedule, MEAN, STD), schedule, x0, times, divergence())
        np.testing.assert_allclose(found, expected.sum(axis=(1, 2)), rtol=2e-4, atol=3e-4)
    # It is the data's own, up to the noise at t = 0 and the signal at t = 1.
    np.testing.assert_allclose(found, norm(MEAN, STD).logpdf(x0).sum(axis=(1, 2)), atol=0.03)


def test_a_mixture():
    weights, means, std = (0.3, 0.7), (-0.6, 0.5), 0.2
    schedule, x0 = linear_flow(sigma_min=0.0), images()
    denoise = mixture_denoiser(schedule, weights, means, std)
    found = likelihood(denoise, schedule, x0, even_times(schedule, 100, start=1e-4))
    density = sum(w * norm(m, std).pdf(x0) for w, m in zip(weights, means, strict=True))
    np.testing.assert_allclose(found, np.log(density).sum(axis=(1, 2)), atol=2e-3)


def test_it_converges_at_fourth_order():
    schedule, x0 = trigonometric(), images()
    expected = norm(MEAN, STD).logpdf(np.asarray(x0, np.float64)).sum(axis=(1, 2))
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    errors = [
        np.abs(likelihood(denoise, schedule, x0, np.linspace(1.0, 0.0, n + 1)) - expected).max()
        for n in (3, 6)
    ]
    assert 11.0 < errors[0] / errors[1] < 22.0


def field(x, t):
    """The golden values' velocity, in the direction in which t = 1 is the noise."""
    wide = t[:, None]
    return -(wide * jnp.tanh(x) + 0.3 * (1.0 - wide))


def test_against_flow_matching():
    schedule = linear_flow(sigma_min=0.0)
    denoise = make_denoiser(field, schedule, velocity, time_input(scale=1.0))
    data = jnp.asarray(GOLDEN["flow_matching/data"], jnp.float32)
    found = likelihood(denoise, schedule, data, even_times(schedule, 20))
    np.testing.assert_allclose(found, GOLDEN["flow_matching/log_likelihood"], rtol=1e-5)
    # Their usual settings, whose error is their own: ten midpoint steps in t.
    times = np.linspace(1.0, 0.0, 11)
    coarse = likelihood(denoise, schedule, data, times, method="midpoint", variable="time")
    np.testing.assert_allclose(coarse, GOLDEN["flow_matching/midpoint"], rtol=1e-5)
    assert np.abs(coarse - found).max() > 1e-4


def coupled(schedule):
    """A denoiser whose Jacobian is no multiple of the identity: of data that are correlated, and how."""
    turn, variances = jnp.asarray([[0.8, -0.6], [0.6, 0.8]]), jnp.asarray([0.1, 0.9])

    def denoise(x, t):
        alpha, sigma, *_ = expand(schedule(t), x[..., 0])
        along = x[..., 0] @ turn
        centred = along / (alpha**2 * variances + sigma**2)
        x0, eps = (alpha * variances * centred) @ turn.T, (sigma * centred) @ turn.T
        return Estimate(x0[..., None], eps[..., None])

    return denoise, np.asarray(turn * variances @ turn.T)


def test_hutchinson_is_unbiased():
    schedule = trigonometric()
    denoise, covariance = coupled(schedule)
    x0 = jnp.broadcast_to(images(1), (500, 2, 1))
    times = np.linspace(1.0, 0.0, 7)
    true = likelihood(denoise, schedule, x0[:1], times)[0]
    vector = np.asarray(x0[0]).ravel()
    expected = -0.5 * (
        vector @ np.linalg.solve(covariance, vector) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    np.testing.assert_allclose(true, expected, atol=1e-3)
    spreads = {}
    for name, divergence in {
        "signs": hutchinson(),
        "normal": hutchinson(gaussian=True),
    }.items():
        found = likelihood(denoise, schedule, x0, times, divergence)
        spreads[name] = found.std()
        np.testing.assert_allclose(found.mean(), true, atol=4.0 * found.std() / 500**0.5)
    assert 0.1 < spreads["signs"] < 0.8 * spreads["normal"]


def test_probes_come_from_each_examples_key():
    probes = hutchinson(num_probes=3)(keys_of(4), images())
    alone = hutchinson(num_probes=3)(keys_of(4)[2:3], images()[2:3])
    np.testing.assert_array_equal(probes[:, 2:3], alone)
    np.testing.assert_allclose(jnp.abs(probes), 3**-0.5, rtol=1e-6)
    assert len(np.unique(np.sign(probes).reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.5, 0.5, 0.0], [1.5, 0.0], [0.5]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="time"):
        log_likelihood(None, cosine(), images(), keys=keys_of(4), times=np.asarray(times))


def test_no_probes_are_refused():
    with pytest.raises(ValueError, match="num_probes is 0"):
        hutchinson(num_probes=0)


def test_bits_per_dim():
    """Uniform noise in 8-bit images: each value has 1/256 of the 255 + 1 bins, 8 bits."""
    uniform = 12 * np.log(127.5 / 256.0)
    np.testing.assert_allclose(bits_per_dim(jnp.float32(uniform), 12), 8.0, rtol=1e-6)


def test_the_bound_against_torch(monkeypatch):
    """All of its terms, with variances between the least and the largest."""
    golden = {name: GOLDEN[f"bound/{name}"] for name in ("betas", "x0", "noise", "share", "prior", "terms")}
    schedule = betas.from_betas(golden["betas"])
    inner = gaussian_denoiser(schedule, MEAN, STD)
    monkeypatch.setattr(noise, "normal_like", lambda keys, x, draw=0: jnp.asarray(golden["noise"], x.dtype))

    def denoise(x, t):
        share = jnp.asarray(golden["share"], jnp.float32)[jnp.round(10.0 * t[0]).astype(int) - 1]
        return inner(x, t)._replace(fraction=share)

    x0 = jnp.asarray(golden["x0"], jnp.float32)
    bound = jax.jit(lambda x: variational_bound(denoise, schedule, x, keys=keys_of(2), num_steps=10))(x0)
    np.testing.assert_allclose(bound.prior, golden["prior"], rtol=1e-5)
    np.testing.assert_allclose(bound.terms, golden["terms"], rtol=2e-4, atol=1e-5)
    total = golden["prior"] + golden["terms"].sum(axis=0)
    np.testing.assert_allclose(bound.total, total, rtol=2e-5)


def test_the_bound_approaches_the_likelihood_from_above(monkeypatch):
    """Every term is quadratic in the noise, so noise of +1 and -1 gives the expectation exactly."""
    signs = jnp.asarray([1.0, -1.0]).reshape(2, 1, 1)
    monkeypatch.setattr(noise, "normal_like", lambda keys, x, draw=0: jnp.broadcast_to(signs, x.shape))
    schedule = cosine(logsnr_min=-12.0, logsnr_max=8.0)
    inner = gaussian_denoiser(schedule, MEAN, STD)
    x0 = jnp.broadcast_to(jnp.asarray([[[-0.4], [0.1], [0.9]]]), (2, 3, 1))
    expected = -norm(MEAN, STD).logpdf(x0[0]).mean() / np.log(2.0)

    def denoise(x, t):
        return inner(x, t)._replace(fraction=jnp.ones_like(x))

    gaps = []
    for steps in (30, 3000):
        run = jax.jit(
            lambda x, steps=steps: (
                variational_bound(
                    denoise, schedule, x, keys=keys_of(2), num_steps=steps, decoder=gaussian_nll
                ).total
            )
        )
        gaps.append(float(run(x0).mean() - expected))
    assert gaps[0] > gaps[1] > 0.0
    assert gaps[1] < 0.02


def test_each_step_of_the_bound_has_noise_of_its_own():
    schedule, seen = cosine(), []

    def denoise(x, t):
        jax.debug.callback(lambda x, t: seen.append((float(t[0]), np.asarray(x))), x, t)
        return Estimate(0.0 * x, x)

    bound = jax.jit(lambda x: variational_bound(denoise, schedule, x, keys=keys_of(3), num_steps=4))
    jax.block_until_ready(bound(jnp.zeros((3, 2, 1))))
    jax.effects_barrier()
    drawn = {t: x / np.asarray(schedule(jnp.float32(t)).sigma) for t, x in seen}
    assert sorted(drawn) == [0.25, 0.5, 0.75, 1.0]
    values = np.concatenate([x.ravel() for x in drawn.values()])
    assert len(np.unique(np.round(values, 4))) == 24
