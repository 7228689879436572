import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from diffjax.diffusion import losses, predictions, weightings
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.inputs import timestep_input
from diffjax.diffusion.learned_variance import (
    discretized_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
    hybrid_loss,
    log_variance,
    posterior,
    vlb_term,
)
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import betas, cosine, edm, linear_flow, trigonometric, ve, vp

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "likelihood.npz")
SCHEDULES = {"cosine": cosine(), "exact": trigonometric(), "flow": linear_flow(), "vp": vp(), "edm": edm()}
CENTRES = np.arange(256) / 127.5 - 1.0

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def draws(count, *shape, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(count)]


@each_schedule
def test_posterior_is_bayes_rule(schedule):
    """q(x_s | x_t, x0) ~ q(x_s | x0) q(x_t | x_s): precisions add."""
    x, x0 = draws(2, 4, 3)
    t, s = np.array([[1.0], [0.8], [0.05], [0.3]]), np.array([[0.9], [0.2], [0.01], [0.299]])
    with jax.enable_x64(True):
        now, then = (jax.tree.map(np.asarray, schedule(jnp.asarray(time))) for time in (t, s))
    ratio = now.alpha / then.alpha
    transition = now.sigma**2 - ratio**2 * then.sigma**2
    precision = 1.0 / then.sigma**2 + ratio**2 / transition
    expected = (then.alpha * x0 / then.sigma**2 + ratio * x / transition) / precision
    mean, variance = posterior(schedule(jnp.float32(t)), schedule(jnp.float32(s)), x, x0)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, 1.0 / precision, rtol=2e-4)


def test_the_posterior_at_the_clean_end_is_the_data():
    x, x0 = draws(2, 3, 4)
    schedule = trigonometric()
    for t in (1.0, 0.5, 1e-3):
        mean, variance = posterior(schedule(jnp.float32(t)), schedule(jnp.float32(0.0)), x, x0)
        np.testing.assert_array_equal(mean, x0)
        assert variance == 0.0


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_log_variance_against_diffusers(name):
    schedule = betas.from_betas(GOLDEN[f"diffusers/{name}/betas"])
    steps, spread = GOLDEN["diffusers/steps"], GOLDEN["diffusers/spread"]
    t, s = (jnp.asarray(steps - back, jnp.float32) / 1000 for back in (0, 1))
    found = log_variance(schedule, t, s, jnp.asarray(0.5 * (spread + 1.0)))
    np.testing.assert_allclose(found, GOLDEN[f"diffusers/{name}/log_variance"], rtol=2e-5, atol=1e-6)
    one = log_variance(schedule, t[2], s[2], jnp.asarray(0.5 * (spread[2:3] + 1.0)))  # as in a sampler
    np.testing.assert_allclose(one[0], found[2], rtol=1e-6)


@each_schedule
def test_log_variance_is_finite_and_between_its_bounds(schedule):
    grid = np.linspace(0.0, 1.0, 21).astype(np.float32)
    s, t = jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])
    small, middle, large = (log_variance(schedule, t, s, jnp.full((20, 2), part)) for part in (0.0, 0.3, 1.0))
    assert np.isfinite(small).all()
    assert np.isfinite(large).all()
    assert (small <= large).all()
    np.testing.assert_allclose(middle, 0.7 * small + 0.3 * large, rtol=1e-5, atol=1e-5)
    assert np.isfinite(log_variance(schedule, jnp.ones(1), jnp.zeros(1), jnp.zeros((1, 2)))).all()


def test_the_last_step_ends_in_the_data_whatever_the_schedule_leaves():
    schedule, t = ve(), jnp.asarray([0.01, 0.3])
    sigma, later = schedule(t).sigma, schedule(2.0 * t).sigma
    small, large = (log_variance(schedule, t, jnp.zeros(2), jnp.full((2, 1), part)) for part in (0.0, 1.0))
    np.testing.assert_allclose(large[:, 0], 2.0 * np.log(sigma), rtol=1e-5)
    np.testing.assert_allclose(small[:, 0], np.log(sigma**2 * (1.0 - sigma**2 / later**2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std", "other", "wide"), [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.9), (2.0, 3.0, 1.0, 0.7)]
)
def test_kl_is_the_integral(mean, std, other, wide):
    first, second = norm(mean, std), norm(other, wide)
    expected, _ = quad(
        lambda x: first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), mean - 12 * std, mean + 12 * std
    )
    found = gaussian_kl(*(jnp.float32(v) for v in (mean, 2 * np.log(std), other, 2 * np.log(wide))))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_density_decoder():
    x, mean, log_std = draws(3, 50)
    np.testing.assert_allclose(
        gaussian_nll(x, mean, log_std), -norm(mean, np.exp(log_std)).logpdf(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.402, 0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("std", [0.002, 0.02, 0.3, 5.0])
def test_the_discretised_decoder(mean, std):
    """The probabilities of the 256 bins sum to 1, and each is the integral of the density, far out too."""
    nll = discretized_gaussian_nll(
        jnp.asarray(CENTRES, jnp.float32), jnp.float32(mean), jnp.float32(np.log(std))
    )
    nll = np.asarray(nll, np.float64)
    np.testing.assert_allclose(np.exp(-nll).sum(), 1.0, rtol=1e-4)
    low, high = ((CENTRES - mean + side / 255.0) / std for side in (-1.0, 1.0))
    low[0], high[-1] = -np.inf, np.inf
    low, high = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    near = np.abs(CENTRES - mean) < 30.0 * std
    with np.errstate(divide="ignore", invalid="ignore"):
        upper, lower = norm.logcdf(high), norm.logcdf(low)
        expected = -(upper + np.log1p(-np.exp(lower - upper)))
    np.testing.assert_allclose(nll[near], expected[near], rtol=3e-4, atol=3e-4)
    assert np.isfinite(nll).all()


def test_the_discretised_decoder_has_finite_gradients():
    x = jnp.asarray(CENTRES, jnp.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(mean, log_std):
        return discretized_gaussian_nll(x, mean, log_std).sum()

    for mean, log_std in ((0.0, -5.0), (3.0, -7.0), (-1.0, 8.0), (1.0, -20.0)):
        assert np.isfinite(slopes(mean, log_std)).all()
    # In the middle of its bin the mean is where it should be.
    assert abs(jax.grad(discretized_gaussian_nll, argnums=1)(jnp.float32(0.0), 0.0, -4.0)) < 1e-4


def arguments(count=6):
    x0, eps = draws(2, count, 4, 3)
    return {
        "prediction": predictions.eps,
        "x0": jnp.clip(x0, -1.0, 1.0),
        "eps": eps,
        "t": jnp.asarray([0.001, 0.0205, 0.3, 0.5, 0.999, 1.0]),
    }


OPTIONS = {"target": predictions.eps, "weighting": weightings.unit()}


def network(params, x, told):
    return jnp.concatenate([params[0] * x, jnp.tanh(params[1] * x)], axis=-1)


def test_the_hybrid_loss_is_the_sum_of_its_parts():
    """Times are those of the process' steps; the second half of the channels is the variance."""
    schedule, seen = betas.ddpm(), []
    case = arguments()

    def net(x, told):
        seen.append(told)
        return network((0.9, 0.3), x, told)

    found = hybrid_loss(net, schedule, **case, inputs=timestep_input(), vlb_weight=0.01, **OPTIONS)
    steps = np.array([1.0, 21.0, 300.0, 500.0, 999.0, 1000.0])
    np.testing.assert_allclose(seen[0], steps - 1.0, atol=1e-3)
    case["t"] = jnp.asarray(steps / 1000, jnp.float32)
    simple = losses.denoising_loss(lambda x, told: 0.9 * x, schedule, **case, **OPTIONS)
    denoise = make_denoiser(
        lambda x, told: network((0.9, 0.3), x, told), schedule, predictions.eps, learned_variance=True
    )
    x = losses.corrupt(schedule, case["x0"], case["eps"], case["t"])
    before = jnp.asarray((steps - 1.0) / 1000, jnp.float32)
    bound = vlb_term(denoise(x, case["t"]), schedule, case["x0"], x, case["t"], before)
    np.testing.assert_allclose(found, simple + 0.01 * 1000 * bound, rtol=1e-4)


def test_the_bound_trains_the_variance_alone():
    schedule, case = betas.ddpm(), arguments()

    @jax.jit
    @jax.grad
    def slopes(params, weight):
        return jnp.mean(
            hybrid_loss(lambda *now: network(params, *now), schedule, **case, vlb_weight=weight, **OPTIONS)
        )

    without, with_it = (np.asarray(slopes(jnp.asarray([0.9, 0.3]), w)) for w in (0.0, 1e-3))
    np.testing.assert_allclose(without[0], with_it[0], rtol=1e-6)
    assert without[1] == 0.0
    assert abs(with_it[1]) > 1e-4


def test_a_denoiser_that_knows_pays_only_for_the_last_step():
    schedule = betas.ddpm()
    x0, eps = jnp.asarray(CENTRES[None, ::5], jnp.float32), draws(1, 1, 52)[0]
    for t, s, least in ((0.4, 0.399, 0.0), (0.001, 0.0, None)):
        t, s = jnp.full(1, t), jnp.full(1, s)
        x = losses.corrupt(schedule, x0, eps, t)
        found = vlb_term(Estimate(x0, eps), schedule, x0, x, t, s)
        if least is None:  # the bin holds 1/255 of 0.0074 on either side
            std = np.exp(0.5 * np.float64(log_variance(schedule, t, s, jnp.zeros((1, 1)))[0, 0]))
            inside = norm.cdf(1 / 255 / std) - norm.cdf(-1 / 255 / std)
            least = -np.log2(inside) * 50 / 52 - np.log2(norm.cdf(1 / 255 / std)) * 2 / 52
        np.testing.assert_allclose(found, least, rtol=1e-4, atol=1e-6)
