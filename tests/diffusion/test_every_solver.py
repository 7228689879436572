"""What must hold of every solver in the table: order of convergence, distribution, clean ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import correlated_denoiser, gaussian_denoiser, gaussian_flow, mixture_denoiser, mixture_flow

from diffjax.diffusion import grids
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.sampling import invert, sample
from diffjax.diffusion.schedules import cosine, ddpm, edm, expand, linear_flow, vp
from diffjax.diffusion.solvers import SOLVERS

MEAN, STD = 0.3, 0.5
DETERMINISTIC = [name for name, factory in SOLVERS.items() if factory().order is not None]
STOCHASTIC = [name for name, factory in SOLVERS.items() if factory().order is None]
SMOOTH = {"flow": linear_flow(), "vp": vp(), "edm": edm(sigma_max=5.0)}  # and cosine, with the mixture


def steps_of(solver, denoise, schedule, x, times):
    """x at the last time, without the noise that `sample` starts from."""
    keys = jax.random.split(jax.random.key(0), x.shape[0])
    path = sample(
        denoise, schedule, solver, keys=keys, shape=x.shape[1:], times=times, start=x, trajectory=True
    )
    return path[-1]


def observed_order(solver, denoise, flow, schedule, counts, start=0.9, end=0.1):
    """The slope of log(error) against log(steps) between two grids, in float64."""
    x = jnp.linspace(-1.5, 1.5, 7)[None]
    exact = flow(x, start, end)
    run = functools.partial(steps_of, solver, denoise, schedule)
    errors = [
        float(jnp.abs(jax.jit(run)(x, np.linspace(start, end, count + 1)) - exact).max()) for count in counts
    ]
    return np.log(errors[0] / errors[1]) / np.log(counts[1] / counts[0]), errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gaussians_are_sampled_along_the_exact_flow(name):
    solver, orders = SOLVERS[name](), []
    with jax.enable_x64(True):
        for schedule in SMOOTH.values():
            denoise = gaussian_denoiser(schedule, MEAN, STD)
            flow = functools.partial(gaussian_flow, schedule, MEAN, STD)
            order, errors = observed_order(solver, denoise, flow, schedule, (30, 60))
            assert errors[1] < 0.02
            orders.append(order)
    # Faster is possible: this flow is affine, and some methods are better at those than at others. The mean
    # over the schedules, because an error that happens to change its sign distorts a single one.
    assert np.mean(orders) > solver.order - 0.25, orders


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_of_convergence_is_the_one_declared(name):
    solver, schedule, mixture = SOLVERS[name](), cosine(), ((0.3, 0.7), (-1.0, 0.8), 0.4)
    with jax.enable_x64(True):
        denoise = mixture_denoiser(schedule, *mixture)
        flow = functools.partial(mixture_flow, schedule, *mixture)
        order, errors = observed_order(solver, denoise, flow, schedule, (40, 80))
    assert errors[1] < 0.02
    assert abs(order - solver.order) < 0.4, (order, errors)


# What a stochastic solver needs beyond many steps of the cosine schedule.
SETTINGS = {
    "dpmpp_2m_sde": (cosine(), grids.uniform_logsnr()),
    "dpmpp_3m_sde": (cosine(), grids.uniform_logsnr()),
    "restart": (
        edm(sigma_max=20.0),
        grids.restart(sigma_min=0.01, sigma_max=20.0, restart_max=3.0, restart_steps=20),
    ),
    "annealed_langevin": (edm(sigma_max=10.0), grids.exponential(sigma_min=0.02, sigma_max=10.0)),
    "edm": (edm(sigma_max=60.0), grids.karras(sigma_min=0.01, sigma_max=20.0)),
}
ONE_SHOT = ("consistency", "lcm")  # which are not meant for a denoiser that averages
MANY_STEPS = [
    # Langevin steps are many: ten a noise level.
    pytest.param(name, marks=pytest.mark.slow) if name == "annealed_langevin" else name
    for name in STOCHASTIC
    if name not in ONE_SHOT
]


@pytest.mark.parametrize("name", MANY_STEPS)
def test_stochastic_solvers_reproduce_the_data(name):
    """Mean and deviation within 3 %, and for a mixture the distribution function within 0.03 everywhere."""
    schedule, grid = SETTINGS.get(name, (cosine(), grids.uniform()))
    count, (weights, means, std) = 16_000, ((0.3, 0.7), (-1.0, 0.8), 0.3)
    times = grid(schedule, 120)
    denoise = mixture_denoiser(schedule, weights, means, std)
    keys = jax.random.split(jax.random.key(1), 16)
    draw = jax.jit(
        lambda keys: sample(denoise, schedule, SOLVERS[name](), keys=keys, shape=(count // 16,), times=times)
    )
    found = np.sort(np.asarray(draw(keys), np.float64).ravel())
    mean = np.dot(weights, means)
    deviation = np.sqrt(std**2 + np.dot(weights, np.square(means)) - mean**2)
    assert abs(found.mean() - mean) < 0.03 * deviation
    assert abs(found.std() / deviation - 1.0) < 0.03
    cdf = sum(w * jax.scipy.stats.norm.cdf((found - m) / std) for w, m in zip(weights, means, strict=True))
    assert np.abs(np.asarray(cdf) - np.arange(count) / count).max() < 0.03


@pytest.mark.parametrize("name", MANY_STEPS)
def test_stochastic_solvers_reproduce_the_covariance(name):
    """Each entry within 6 % of the largest variance: what 120 steps leave, and chance."""
    schedule, grid = SETTINGS.get(name, (cosine(), grids.uniform()))
    covariance = np.array([[0.5, -0.3, 0.1], [-0.3, 0.4, 0.0], [0.1, 0.0, 0.2]])
    times, denoise = grid(schedule, 120), correlated_denoiser(schedule, covariance)
    keys = jax.random.split(jax.random.key(2), 16)
    draw = jax.jit(
        lambda keys: sample(denoise, schedule, SOLVERS[name](), keys=keys, shape=(1000, 3), times=times)
    )
    found = np.asarray(draw(keys), np.float64).reshape(-1, 3)
    # Langevin steps of finite size widen what they sample, by about a quarter of step_size.
    slack = 0.1 if name == "annealed_langevin" else 0.06
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=slack * 0.5)
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=0.03)


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("count", [1, 4])
def test_consistency_samplers_are_exact_for_a_consistent_model(name, count):
    """Whose estimate is where the flow ends: every number of steps reproduces the data."""
    schedule = ddpm()

    def denoise(x, t):
        ends = jax.vmap(lambda x, t: gaussian_flow(schedule, MEAN, STD, x, t, 0.0))(x, t)
        wide = expand(schedule(t), x)
        return Estimate(ends, (x - wide.alpha * ends) / wide.sigma)

    keys, times = jax.random.split(jax.random.key(2), 16), grids.trailing()(schedule, count)
    found = np.asarray(
        sample(denoise, schedule, SOLVERS[name](), keys=keys, shape=(1000,), times=times), np.float64
    )
    assert abs(found.mean() - MEAN) < 0.02
    assert abs(found.std() / STD - 1.0) < 0.02
    assert abs(np.mean((found - MEAN) ** 4) / STD**4 - 3.0) < 0.2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_followed_by_sampling_returns_the_image(name):
    schedule, solver = cosine(logsnr_max=8.0), SOLVERS[name]()
    denoise = mixture_denoiser(schedule, (0.3, 0.7), (-1.0, 0.8), 0.4)
    x0 = jnp.linspace(-1.4, 1.4, 9)[None]
    times = grids.uniform(start=0.97)(schedule, 200)

    @jax.jit
    def both(x0):
        noise = invert(denoise, schedule, solver, x0, times=times)
        keys = jax.random.split(jax.random.key(0), 1)
        return noise, sample(denoise, schedule, solver, keys=keys, shape=(9,), times=times, start=noise)

    noise, back = both(x0)
    np.testing.assert_allclose(back, x0, atol=0.05 if solver.order == 1 else 0.01)
    exact = mixture_flow(schedule, (0.3, 0.7), (-1.0, 0.8), 0.4, schedule(0.0 * x0).alpha * x0, 0.0, 0.97)
    np.testing.assert_allclose(noise, exact, atol=0.1 if solver.order == 1 else 0.03)


def test_what_is_stochastic_has_no_inverse():
    with pytest.raises(ValueError, match="choose a deterministic one"):
        invert(None, cosine(), SOLVERS["ddpm"](), jnp.zeros((1, 2)), times=np.linspace(1.0, 0.0, 3))


CLEAN_ENDS = {
    "ddpm": (ddpm(), grids.trailing()),
    "flow": (linear_flow(sigma_min=0.0), grids.uniform(start=0.999)),
    "edm": (edm(), grids.karras(sigma_min=0.01, sigma_max=70.0)),
}


@pytest.mark.parametrize(("schedule", "grid"), CLEAN_ENDS.values(), ids=CLEAN_ENDS.keys())
@pytest.mark.parametrize("name", SOLVERS)
def test_a_clean_end_is_reached_in_a_few_steps_and_with_gradients(name, schedule, grid):
    denoise, solver = gaussian_denoiser(schedule, MEAN, STD), SOLVERS[name]()
    keys, times = jax.random.split(jax.random.key(3), 4), grid(schedule, 4)
    start = schedule(times[0]).sigma * jax.random.normal(jax.random.key(4), (4, 8))

    def total(shift):
        x = sample(denoise, schedule, solver, keys=keys, shape=(8,), times=times, start=start + shift)
        return jnp.abs(x).mean()

    # One schedule is enough for gradients: what can spoil them is the same step to sigma = 0.
    run = jax.value_and_grad(total) if schedule is CLEAN_ENDS["ddpm"][0] else total
    assert schedule(times[-1]).sigma == 0.0
    assert all(np.isfinite(part) for part in jax.tree.leaves(jax.jit(run)(0.0)))
