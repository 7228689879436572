from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser

from diffjax.diffusion import noise as noise_module
from diffjax.diffusion.posterior import add_score, by_gradient, dps, pigdm, repaint, resampling_times
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import Coeffs, cosine, expand, linear_flow, trigonometric, ve
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.diffusion.solvers.wrappers import jumping

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance.npz")
SCHEDULES = {"cosine": cosine(), "flow": linear_flow(), "ve": ve()}
MATRIX = jnp.array([[1.0, -0.5, 0.3, 0.0], [0.2, 0.8, 0.0, -1.0]])
Y = jnp.array([[0.7, -1.1], [0.0, 0.4], [2.0, 1.0]])

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def keys_of(count):
    return jax.random.split(jax.random.key(0), count)


def points(size, count=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, size)), jnp.float32)


def through(matrix):
    """The measurement of vectors by a matrix."""
    return lambda x: x @ matrix.T


def exact(schedule, x, t, matrix, y, noise_std, data_std):
    """E[x0 | x_t, y] where x0 ~ N(0, data_std^2) and y = matrix x0 + noise, by Bayes, in float64."""
    alpha, sigma = (np.float64(c) for c in schedule(jnp.float32(t))[:2])
    matrix, y, x = (np.asarray(value, np.float64) for value in (matrix, y, x))
    cov = 1.0 / (1.0 / data_std**2 + alpha**2 / sigma**2)  # of p(x0 | x_t), whose mean is
    mean = cov * alpha / sigma**2 * x
    gain = cov * matrix.T @ np.linalg.inv(cov * matrix @ matrix.T + noise_std**2 * np.eye(len(matrix)))
    x0 = mean + (y - mean @ matrix.T) @ gain.T
    return x0, (x - alpha * x0) / sigma


@each_schedule
@pytest.mark.parametrize("t", [0.02, 0.5, 0.98])
def test_the_gradient_of_the_likelihood_makes_the_posterior(schedule, t):
    mean, std, y, noise_std = 0.4, 0.7, points(4, seed=1), 0.3
    prior = gaussian_denoiser(schedule, mean, std)

    def log_likelihood(x, t):
        alpha, sigma, *_ = expand(schedule(t), x)
        variance = (std * sigma) ** 2 / (alpha**2 * std**2 + sigma**2) + noise_std**2
        return -((y - prior(x, t).x0) ** 2 / (2.0 * variance)).sum(axis=1)

    precision = 1.0 / std**2 + 1.0 / noise_std**2
    posterior = gaussian_denoiser(schedule, (mean / std**2 + y / noise_std**2) / precision, precision**-0.5)
    x, times = 1.5 * points(4), jnp.full((3,), t)
    found, wanted = by_gradient(prior, schedule, log_likelihood)(x, times), posterior(x, times)
    np.testing.assert_allclose(found.x0, wanted.x0, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.eps, wanted.eps, rtol=1e-4, atol=1e-3)


def test_the_gradient_has_a_scale_for_each_example():
    schedule, x, t, scale = cosine(), points(4), jnp.array([0.1, 0.5, 0.9]), jnp.array([0.0, 1.0, 3.0])
    prior = gaussian_denoiser(schedule, 0.0, 1.0)
    coeffs, plain = expand(schedule(t), x), prior(x, t)
    found = by_gradient(prior, schedule, lambda x, t: -(x**2).sum(axis=1), scale)(x, t)
    np.testing.assert_allclose(found.eps, plain.eps + scale[:, None] * coeffs.sigma * 2.0 * x, rtol=1e-5)
    np.testing.assert_allclose(coeffs.alpha * found.x0 + coeffs.sigma * found.eps, x, atol=1e-5)


def test_without_signal_there_is_nothing_to_learn():
    estimate = Estimate(jnp.ones((1, 2)), jnp.ones((1, 2)))
    coeffs = expand(trigonometric()(jnp.ones(1)), estimate.x0)
    np.testing.assert_array_equal(coeffs.alpha, 0.0)
    for found, wanted in zip(add_score(estimate, coeffs, 5.0 * estimate.x0)[:2], estimate[:2], strict=True):
        np.testing.assert_array_equal(found, wanted)


@each_schedule
@pytest.mark.parametrize("t", [0.01, 0.3, 0.97])
@pytest.mark.parametrize(("noise_std", "data_std"), [(0.3, 1.0), (0.0, 1.0), (0.1, 0.5)])
def test_pigdm_is_exact_for_gaussian_data(schedule, t, noise_std, data_std):
    x = 1.5 * points(4)
    denoise = pigdm(
        gaussian_denoiser(schedule, 0.0, data_std),
        schedule,
        through(MATRIX),
        Y,
        noise_std=noise_std,
        data_std=data_std,
    )
    found = jax.jit(denoise)(x, jnp.full((3,), t))
    x0, eps = exact(schedule, x, t, MATRIX, Y, noise_std, data_std)
    np.testing.assert_allclose(found.x0, x0, rtol=1e-3, atol=2e-4 * np.abs(x0).max())
    np.testing.assert_allclose(found.eps, eps, rtol=1e-3, atol=2e-4 * np.abs(eps).max())


def test_pigdm_fills_in_a_mask():
    """The measurement may be as large as the image and 0 where nothing is known: A A^T is singular."""
    schedule, mask = cosine(), jnp.array([1.0, 0.0, 1.0, 0.0])
    x, y, t = points(4), mask * points(4, seed=1), jnp.array([0.1, 0.5, 0.9])
    prior = gaussian_denoiser(schedule, 0.0, 1.0)
    found, plain = pigdm(prior, schedule, lambda x: mask * x, y)(x, t), prior(x, t)
    np.testing.assert_allclose(found.x0, jnp.where(mask > 0, y, plain.x0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_pigdm_samples_the_posterior(noise_std):
    """DDIM's result is affine in its start, so its mean and covariance need no random numbers."""
    schedule, y = cosine(), jnp.broadcast_to(Y[0], (5, 2))
    denoise = pigdm(gaussian_denoiser(schedule, 0.0, 1.0), schedule, through(MATRIX), y, noise_std=noise_std)
    start = jnp.concatenate([jnp.zeros((1, 4)), jnp.eye(4)])
    result = jax.jit(
        lambda start: sample(
            denoise, schedule, ddim(), keys=keys_of(5), shape=(4,), times=np.linspace(1, 0, 401), start=start
        )
    )(start)
    mean, directions = result[0], result[1:] - result[0]
    matrix = np.asarray(MATRIX, np.float64)
    gain = matrix.T @ np.linalg.inv(matrix @ matrix.T + noise_std**2 * np.eye(2))
    np.testing.assert_allclose(mean, gain @ np.asarray(Y[0]), atol=0.01)
    np.testing.assert_allclose(directions.T @ directions, np.eye(4) - gain @ matrix, atol=0.02)


def test_dps_takes_the_papers_step():
    schedule, t, s, zeta = cosine(), jnp.float32(0.6), jnp.float32(0.5), 0.7
    x, now = points(4), cosine()(jnp.float32(0.6))
    prior = gaussian_denoiser(schedule, 0.0, 1.0)
    stepped, _ = ddim().step(prior, schedule, x, t, s, keys_of(3), ())
    found, carry = dps(ddim(), through(MATRIX), Y, zeta=zeta).step(prior, schedule, x, t, s, keys_of(3), ())
    slope = float(now.alpha / (now.alpha**2 + now.sigma**2))  # x0hat = slope x
    residual = slope * x @ MATRIX.T - Y
    gradient = slope * (residual / jnp.linalg.norm(residual, axis=1, keepdims=True)) @ MATRIX
    np.testing.assert_allclose(found, stepped - zeta * gradient, rtol=1e-5, atol=1e-5)
    assert carry == ()


def test_dps_does_not_move_what_agrees():
    schedule, x, t, s = cosine(), points(4), jnp.float32(0.6), jnp.float32(0.5)
    prior = gaussian_denoiser(schedule, 0.0, 1.0)
    y = through(MATRIX)(prior(x, jnp.full((3,), t)).x0)
    found, _ = jax.jit(
        lambda x: dps(ddim(), through(MATRIX), y).step(prior, schedule, x, t, s, keys_of(3), ())
    )(x)
    np.testing.assert_allclose(found, ddim().step(prior, schedule, x, t, s, keys_of(3), ())[0], atol=1e-4)


# Two pixels of variance 1 and correlation 0.8, the first of them known to be 1: the second is N(0.8, 0.36).
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
COUNT = 3000


def correlated(schedule):
    """The exact denoiser of the two pixels."""
    values, vectors = np.linalg.eigh(COVARIANCE)

    def denoise(x, t):
        coeffs = expand(schedule(t), x)
        within = (x @ vectors) / (coeffs.alpha**2 * values + coeffs.sigma**2)
        return Estimate(coeffs.alpha * (within * values) @ vectors.T, coeffs.sigma * within @ vectors.T)

    return denoise


def drawn(solver, times):
    schedule = cosine()
    settings = {"keys": keys_of(COUNT), "shape": (2,), "times": times}
    return np.asarray(jax.jit(lambda: sample(correlated(schedule), schedule, solver, **settings))())


def test_dps_comes_to_agree_with_the_measurement():
    times = np.linspace(1.0, 0.0, 201)
    found = drawn(dps(ddpm(), lambda x: x[:, :1], jnp.ones((COUNT, 1)), zeta=0.04), times)
    assert np.abs(found[:, 0] - 1.0).mean() < 0.05  # draws from the prior are 1.17 away
    # The method is approximate: its mean of the other pixel rises with the step size.
    np.testing.assert_allclose(found.mean(axis=0), [1.0, 0.8], atol=0.1)


def test_repaint_comes_to_the_conditional_distribution_by_resampling():
    known, mask, times = jnp.ones((COUNT, 2)), jnp.array([1.0, 0.0]), np.linspace(1.0, 0.0, 51)
    solver = jumping(repaint(ddpm(), known, mask))
    errors = []
    for grid in (times, resampling_times(times, jump=5, repeats=6)):
        found = drawn(solver, grid)
        np.testing.assert_allclose(found[:, 0], 1.0, atol=5e-3)
        errors.append(abs(found[:, 1].mean() - 0.8))
    assert errors[0] > 3.0 * errors[1]
    assert errors[1] < 0.08
    np.testing.assert_allclose(found[:, 1].std(), 0.6, atol=0.06)


def test_repaint_agrees_with_diffusers(monkeypatch):
    case = {name.split("/")[1]: value for name, value in GOLDEN.items() if name.startswith("repaint_step/")}
    monkeypatch.setattr(noise_module, "normal_like", lambda keys, x, draw=0: case["noise"])

    def schedule(t):
        alpha = jnp.where(t == 0.5, *case["alphas"])
        return Coeffs(alpha, jnp.sqrt(1.0 - alpha**2), t, t)

    def denoise(x, t):
        return Estimate(case["x0"], case["eps"])

    solver = repaint(ddim(eta=1.0), case["known"], case["mask"])
    found, _ = solver.step(denoise, schedule, case["x"], jnp.float32(0.5), jnp.float32(0.4), keys_of(2), ())
    np.testing.assert_allclose(found, case["result"], rtol=1e-5, atol=1e-5)


def test_known_pixels_have_noise_of_their_own():
    """Noise that the solver has used already would make them agree by accident."""
    schedule, t, s = cosine(), jnp.float32(0.6), jnp.float32(0.5)
    zero = jnp.zeros((2, 4))

    def denoise(x, t):
        return Estimate(zero, zero)

    unknown, _ = ddpm().step(denoise, schedule, zero, t, s, keys_of(2), ())
    known, _ = repaint(ddpm(), zero, jnp.ones(4)).step(denoise, schedule, zero, t, s, keys_of(2), ())
    assert abs(np.corrcoef(np.ravel(unknown), np.ravel(known))[0, 1]) < 0.9


@pytest.mark.parametrize("case", range(6))
def test_resampling_times_agree_with_diffusers(case):
    steps, jump, repeats = (int(value) for value in GOLDEN[f"repaint/{case}/settings"])
    found = resampling_times(np.linspace(1.0, 0.0, steps + 1), jump=jump, repeats=repeats)
    places = np.round(found * steps).astype(int) - 1  # theirs: the last noisy step is 0, the image -1
    path = [places[0]]
    for place in places[1:]:  # theirs goes up step by step
        path += range(path[-1] + 1, place + 1) if place > path[-1] else [place]
    np.testing.assert_array_equal(path, [*GOLDEN[f"repaint/{case}/path"], -1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pigdm(None, None, None, None, noise_std=-1.0), "noise_std -1.0 must be"),
        (lambda: pigdm(None, None, None, None, data_std=0.0), "data_std 0.0 above 0"),
        (lambda: dps(ddim(), None, None, zeta=0.0), "zeta is 0.0; expected more than 0"),
        (lambda: resampling_times(np.array([1.0, 0.0]), jump=0), "jump is 0, repeats 10; expected 1 or more"),
        (lambda: resampling_times(np.array([1.0, 0.0]), repeats=0), "repeats 0; expected 1 or more"),
        (lambda: resampling_times(np.array([0.0, 1.0])), "times must decrease"),
    ],
)
def test_a_bad_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
