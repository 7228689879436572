"""A small network learns eight Gaussians in the plane, by any process: the names are those of docs/core.md.

python docs/mixture_2d.py --schedule=linear_flow --prediction=velocity --solver=heun --grid=uniform"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from matplotlib import pyplot

from diffjax.diffusion import grids, inputs, losses, predictions, schedules, solvers, timesteps, weightings
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.sampling import sample

TABLES = {
    "schedule": (schedules.SCHEDULES, "linear_flow"),
    "prediction": (predictions.PREDICTIONS, "edm"),
    "weighting": (weightings.WEIGHTINGS, "unit"),
    "times": (timesteps.TIMESTEPS | {"grid": None}, "grid"),  # as often as the sampler visits them
    "solver": (solvers.SOLVERS, "dpmpp_2m"),
    "grid": (grids.TIME_GRIDS, "uniform_logsnr"),
}
parser = argparse.ArgumentParser()
for key, (table, default) in TABLES.items():
    parser.add_argument(f"--{key}", choices=table, default=default)
parser.add_argument("--steps", type=int, default=4000, help="of training")
parser.add_argument("--out", default="mixture.png")
args = parser.parse_args()
parts = {key: table[getattr(args, key)] for key, (table, _) in TABLES.items()}
schedule, row, weight, solver = (parts[key]() for key in ("schedule", "prediction", "weighting", "solver"))
times = grids.check_grid(parts["grid"]()(schedule, 50), schedule, row, solver)
keys = jax.random.split(jax.random.key(0), 4)
angle = jnp.pi / 4.0 * jax.random.randint(keys[0], (100_000,), 0, 8)
data = 0.7 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1) + 0.04 * jax.random.normal(keys[1], (100_000, 2))
mlp = nn.Sequential([nn.Dense(192), nn.silu, nn.Dense(192), nn.silu, nn.Dense(192), nn.silu, nn.Dense(2)])
optimizer, told = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps)), inputs.edm_input()


def net(params, x, level):
    angles = level[:, None] * 2.0 ** jnp.arange(-2, 4)
    return mlp.apply(params, jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=1))


def loss(params, key):
    x0, eps = jax.random.choice(key, data, (512,)), jax.random.normal(jax.random.fold_in(key, 1), (512, 2))
    process = {"prediction": row, "target": row, "weighting": weight, "inputs": told, "x0": x0, "eps": eps}
    key = jax.random.fold_in(key, 2)
    spread = jnp.interp(jax.random.uniform(key, (512,)), jnp.linspace(0.0, 1.0, len(times)), times)
    t = spread if args.times == "grid" else parts["times"]()(key, 512)
    return losses.denoising_loss(lambda *x: net(params, *x), schedule, **process, t=t).mean()


def update(state, key):
    change, memory = optimizer.update(jax.grad(loss)(state[0], key), state[1])
    return (optax.apply_updates(state[0], change), memory), None


params = mlp.init(keys[2], jnp.zeros((1, 14)))
train = jax.jit(lambda state: jax.lax.scan(update, state, jax.random.split(keys[3], args.steps))[0][0])
params = train((params, optimizer.init(params)))
denoise = make_denoiser(lambda *x: net(params, *x), schedule, row, told)
keys = jax.random.split(jax.random.key(1), 2048)
paths = sample(denoise, schedule, solver, keys=keys, shape=(2,), times=times, trajectory=True)
figure, panels = pyplot.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
panels[1].plot(*paths[:, :150].transpose(2, 0, 1), color="0.6", linewidth=0.3)
for panel, points in zip(panels, (data[:2048], paths[-1, :150], paths[-1]), strict=True):
    panel.scatter(*points.T, s=1.5)
    panel.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
panels[1].set_title(f"{args.schedule}, {args.prediction}, {args.solver}", fontsize=8)
figure.savefig(args.out, dpi=100)
