"""What must hold of every solver in the table: order of convergence, distribution, clean ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser, gaussian_flow, mixture_denoiser, mixture_flow

from diffjax.diffusion import grids
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import cosine, ddpm, edm, linear_flow, vp
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
    "restart": (edm(sigma_max=20.0), grids.restart(sigma_min=0.01, sigma_max=20.0, restart_max=3.0)),
    "annealed_langevin": (edm(sigma_max=10.0), grids.exponential(sigma_min=0.02, sigma_max=10.0)),
    "edm": (edm(sigma_max=60.0), grids.karras(sigma_min=0.01, sigma_max=20.0)),
}
ONE_SHOT = ("consistency", "lcm")  # which are not meant for a denoiser that averages


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name not in ONE_SHOT])
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
