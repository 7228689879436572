"""Any process of the library on a mixture of eight Gaussians, in seconds on a CPU; names are the tables'.

python docs/mixture_2d.py --schedule=linear_flow --prediction=velocity --solver=heun --out=mixture.png
python docs/mixture_2d.py --schedule=vp:beta_max=12 --prediction=eps --solver=dpmpp_2m_sde:eta=0.5
"""

import argparse
import ast
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffjax.diffusion import grids, inputs, losses, predictions, schedules, solvers, timesteps, weightings
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.sampling import sample

TABLES = {
    "schedule": schedules.SCHEDULES,
    "prediction": predictions.PREDICTIONS,
    "weighting": weightings.WEIGHTINGS,
    "times": timesteps.TIMESTEPS,
    "solver": solvers.SOLVERS,
    "grid": grids.TIME_GRIDS,
}
USUAL = dict(zip(TABLES, ("linear_flow", "v", "unit", "stratified", "dpmpp_2m", "karras"), strict=True))
CHOICES = {  # where others suit a schedule better: most of these blobs' detail is at little noise
    "linear_flow": {"prediction": "velocity", "solver": "heun", "grid": "uniform"},
    "polynomial": {"times": "stratified:shift=0.3"},
    "linear_vp": {"times": "stratified:shift=0.05"},
    "vp": {"times": "stratified:shift=0.3"},
    "ddpm": {"times": "stratified:shift=0.3"},
    "sub_vp": {"times": "stratified:shift=0.5"},
    "ve": {"prediction": "edm", "grid": "uniform"},
    "edm": {"prediction": "edm", "times": "log_normal_sigma", "solver": "heun"},
    "laplace": {"schedule": "laplace:scale=2"},
}


class MLP(nn.Module):
    """Three hidden layers, which see x and harmonics of the noise level."""

    @nn.compact
    def __call__(self, x, level):
        angles = level[:, None] * 2.0 ** jnp.arange(-2, 4)
        x = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for _ in range(3):
            x = nn.silu(nn.Dense(192)(x))
        return nn.Dense(2)(x)


def build(names):
    """The objects that names such as `ddim:eta=1` mean."""
    parts = []
    for table, (name, _, rest) in zip(TABLES.values(), (n.partition(":") for n in names.values()), strict=True):
        pairs = (setting.split("=") for setting in rest.split(",") if setting)
        parts.append(table[name](**{key: ast.literal_eval(value) for key, value in pairs}))
    return parts


def draw_data(key, count):
    """Eight Gaussians of standard deviation 0.04 on a circle of radius 0.7."""
    which, where = jax.random.split(key)
    angle = jnp.pi / 4.0 * jax.random.randint(which, (count, 1), 0, 8)
    centre = 0.7 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return centre + 0.04 * jax.random.normal(where, (count, 2))


def train_and_sample(names, *, steps, num_steps=50, count=2048, batch=512):
    """Train the MLP and sample it: paths `[num_steps + 1, count, 2]`, scaled to noise or data of unit size."""
    schedule, prediction, weighting, times, solver, grid = build(names)
    model, shown = MLP(), inputs.edm_input()
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    visited = grids.check_grid(grid(schedule, num_steps), schedule, prediction, solver)

    def loss(params, key):
        data_key, eps_key, t_key = jax.random.split(key, 3)
        process = {"prediction": prediction, "target": prediction, "weighting": weighting, "inputs": shown}
        draws = {"x0": draw_data(data_key, batch), "eps": jax.random.normal(eps_key, (batch, 2))}
        net = lambda x, level: model.apply(params, x, level)  # noqa: E731
        return losses.denoising_loss(net, schedule, **process, **draws, t=times(t_key, batch)).mean()

    def update(state, key):
        params, memory = state
        change, memory = optimizer.update(jax.grad(loss)(params, key), memory)
        return (optax.apply_updates(params, change), memory), None

    @jax.jit
    def run(key):
        init_key, train_key, sample_key = jax.random.split(key, 3)
        params = model.init(init_key, jnp.zeros((1, 2)), jnp.zeros(1))
        keys = jax.random.split(train_key, steps)
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), keys)
        denoise = make_denoiser(lambda x, level: model.apply(params, x, level), schedule, prediction, shown)
        keys = jax.random.split(sample_key, count)
        paths = sample(denoise, schedule, solver, keys=keys, shape=(2,), times=visited, trajectory=True)
        alpha, sigma, *_ = schedule(jnp.asarray(visited, jnp.float32))
        return paths / jnp.hypot(alpha, sigma)[:, None, None]

    return run(jax.random.key(0))


def distance(x, y):
    """Energy distance of two samples `[count, 2]`: `2 E|x - y| - E|x - x'| - E|y - y'|`; 0 for equals."""
    gap = lambda a, b: jnp.linalg.norm(a[:, None] - b[None] + 1e-12, axis=-1).mean()  # noqa: E731
    return float(2.0 * gap(x, y) - gap(x, x) - gap(y, y))


def spread(x):
    """The standard deviation of points about the nearest of the eight centres: 0.04 in the data."""
    angle = jnp.pi / 4.0 * jnp.round(jnp.arctan2(x[:, 1], x[:, 0]) / (jnp.pi / 4.0))
    return float(jnp.std(x - 0.7 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)))


def plot(data, paths, title, out):
    """Data, some paths from noise to samples, and the samples, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: run `pip install 'diffjax[examples]'`") from error
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[1].plot(paths[:, :150, 0], paths[:, :150, 1], color="0.5", linewidth=0.3)
    panels[1].scatter(*paths[0, :150].T, s=3, color="tab:orange")
    for panel, points, name in zip(panels, (data, paths[-1, :150], paths[-1]), ("data", title, "samples"), strict=True):
        panel.scatter(*points.T, s=2, linewidths=0, color="tab:blue")
        limit = 2.2 if panel is panels[1] else 1.0
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        panel.set_title(name, fontsize=8)
    figure.savefig(out, dpi=100)


def main(arguments=None):
    """Read the arguments, train, sample, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, table in TABLES.items():
        parser.add_argument(f"--{name}", help=", ".join(table))
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--num_steps", type=int, default=50, help="of sampling")
    parser.add_argument("--out", default="mixture.png")
    given = vars(parser.parse_args(arguments))
    steps, num_steps, out = (given.pop(name) for name in ("steps", "num_steps", "out"))
    schedule = given["schedule"] or USUAL["schedule"]
    names = {**USUAL, "schedule": schedule, **CHOICES.get(schedule, {})}
    names.update({name: value for name, value in given.items() if value and value != schedule})

    began = time.perf_counter()
    paths = jax.block_until_ready(train_and_sample(names, steps=steps, num_steps=num_steps))
    data, found = draw_data(jax.random.key(1), 2048), paths[-1]
    print(" ".join(f"{name}={value}" for name, value in names.items()))
    print(f"energy distance {distance(found, data):.4f}, spread {spread(found):.3f} (data {spread(data):.3f})")
    print(f"{steps} training steps and {len(found)} samples in {time.perf_counter() - began:.1f} s")
    plot(data, paths, f"{names['schedule']}, {names['prediction']}, {names['solver']}", out)


if __name__ == "__main__":
    main()
