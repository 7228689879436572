"""Any process of the library on a mixture of eight Gaussians, in seconds on a CPU; names are the tables'.

python docs/mixture_2d.py --schedule=linear_flow --prediction=velocity --solver=heun --out=mixture.png
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffjax.diffusion import grids, inputs, losses, predictions, sampling, schedules, solvers, timesteps, weightings
from diffjax.diffusion.denoiser import make_denoiser

TABLES = {
    "schedule": schedules.SCHEDULES,
    "prediction": predictions.PREDICTIONS,
    "weighting": weightings.WEIGHTINGS,
    "times": timesteps.TIMESTEPS,
    "solver": solvers.SOLVERS,
    "grid": grids.TIME_GRIDS,
}
USUAL = {"schedule": "linear_flow", "prediction": "v", "weighting": "unit", "times": "stratified"}
USUAL |= {"solver": "dpmpp_2m", "grid": "uniform"}
CHOICES = {  # of some schedules
    "linear_flow": {"prediction": "velocity", "solver": "heun"},
    "ve": {"prediction": "edm"},
    "edm": {"prediction": "edm", "times": "log_normal_sigma", "solver": "heun", "grid": "karras"},
}


class MLP(nn.Module):
    """Three hidden layers that see x and harmonics of the noise level."""

    @nn.compact
    def __call__(self, x, level):
        angles = level[:, None] * 2.0 ** jnp.arange(-2, 4)
        x = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for _ in range(3):
            x = nn.silu(nn.Dense(128)(x))
        return nn.Dense(2)(x)


def draw_data(key, count):
    """Eight Gaussians of standard deviation 0.04 on a circle of radius 0.7."""
    which, where = jax.random.split(key)
    angle = jnp.pi / 4.0 * jax.random.randint(which, (count, 1), 0, 8)
    centre = 0.7 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return centre + 0.04 * jax.random.normal(where, (count, 2))


def distance(x, y):
    """The sliced Wasserstein distance: the mean over directions of that between the projections."""
    angle = jnp.pi * jnp.arange(64) / 64
    x, y = (jnp.sort(points @ jnp.stack([jnp.cos(angle), jnp.sin(angle)]), axis=0) for points in (x, y))
    return float(jnp.sqrt(jnp.mean((x - y) ** 2)))


def train_and_sample(names, *, steps, num_steps, count=2048, batch=512, seed=0):
    """Train the MLP on the process that `names` describe; the trajectories, `[num_steps + 1, count, 2]`."""
    part = {key: TABLES[key][name]() for key, name in names.items()}
    schedule, prediction, shown, model = part["schedule"], part["prediction"], inputs.edm_input(), MLP()
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    init_key, train_key, sample_key = jax.random.split(jax.random.key(seed), 3)

    def loss(params, key):
        x0_key, eps_key, t_key = jax.random.split(key, 3)
        x0, eps = draw_data(x0_key, batch), jax.random.normal(eps_key, (batch, 2))
        return losses.denoising_loss(
            lambda x, level: model.apply(params, x, level), schedule, prediction=prediction, target=prediction,
            weighting=part["weighting"], x0=x0, eps=eps, t=part["times"](t_key, batch), inputs=shown,
        ).mean()  # fmt: skip

    def update(state, key):
        params, memory = state
        change, memory = optimizer.update(jax.grad(loss)(params, key), memory)
        return (optax.apply_updates(params, change), memory), None

    @jax.jit
    def run(params):
        state = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(update, state, jax.random.split(train_key, steps))
        denoise = make_denoiser(lambda x, level: model.apply(params, x, level), schedule, prediction, shown)
        times = part["grid"](schedule, num_steps)
        grids.check_grid(times, schedule, prediction, part["solver"])
        path = sampling.sample(
            denoise, schedule, part["solver"], keys=jax.random.split(sample_key, count), shape=(2,), times=times,
            trajectory=True,
        )  # fmt: skip
        return path / jnp.maximum(1e-3, jax.vmap(lambda t: schedule(t).alpha)(jnp.asarray(times)))[:, None, None]

    return run(model.init(init_key, jnp.zeros((1, 2)), jnp.zeros(1)))
