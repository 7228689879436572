from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.inputs import time_input
from diffjax.diffusion.paths import PATHS, flow_matching_loss, icfm, vp_cfm
from diffjax.diffusion.predictions import velocity
from diffjax.diffusion.schedules import linear_flow
from diffjax.diffusion.solvers.ancestral import ddim

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "likelihood.npz")

each_path = pytest.mark.parametrize("name", PATHS)


def batch(count=5, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=(count, 2, 3)), jnp.float32) for _ in range(3))


@each_path
def test_against_torchcfm(name):
    """There t = 1 is the data, and time and velocity run the other way."""
    t, source, data, blur = (GOLDEN[f"torchcfm/{part}"] for part in ("t", "source", "data", "noise"))
    path = PATHS[name](sigma=float(GOLDEN[f"torchcfm/{name}/sigma"]))
    x, speed = path(data, source, jnp.asarray(1.0 - t)[:, None, None], blur)
    np.testing.assert_allclose(x, GOLDEN[f"torchcfm/{name}/x"], atol=2e-6)
    np.testing.assert_allclose(-speed, GOLDEN[f"torchcfm/{name}/velocity"], rtol=1e-5, atol=2e-5)


@each_path
def test_the_velocity_is_the_derivative_of_the_path(name):
    x0, x1, z = batch()
    t = jnp.asarray([0.01, 0.2, 0.5, 0.7, 0.99])[:, None, None]
    path = PATHS[name]()
    x, speed = path(x0, x1, t, z)
    again, found = jax.jvp(lambda t: path(x0, x1, t, z)[0], (t,), (jnp.ones_like(t),))
    np.testing.assert_array_equal(x, again)
    np.testing.assert_allclose(speed, found, rtol=2e-4, atol=1e-4)


@each_path
def test_the_ends_are_data_and_source(name):
    x0, x1, z = batch()
    path = PATHS[name](sigma=1e-6)
    for t, end in ((0.0, x0), (1.0, x1)):
        x, speed = path(x0, x1, jnp.full((5, 1, 1), t), z)
        np.testing.assert_allclose(x, end, atol=1e-5)
        assert np.isfinite(speed).all()


@each_path
def test_a_perfect_network_has_no_loss(name, monkeypatch):
    x0, x1, z = batch()
    monkeypatch.setattr(noise, "normal_like", lambda keys, x, draw=0: z)
    t = jnp.asarray([0.1, 0.2, 0.5, 0.7, 0.9])
    path, seen = PATHS[name](), []
    x, speed = path(x0, x1, t[:, None, None], z)

    def net(x, told):
        seen.append((x, told))
        return speed + jnp.asarray([0.0, 1.0, 0.0, 2.0, 0.0])[:, None, None]

    loss = flow_matching_loss(net, path, x0=x0, x1=x1, t=t, keys=None)
    np.testing.assert_allclose(loss, [0.0, 1.0, 0.0, 4.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(seen[0][0], x)
    np.testing.assert_allclose(seen[0][1], 1000.0 * t)


def test_the_blur_comes_from_each_examples_key():
    x0, x1, _ = batch()
    keys, seen = jax.random.split(jax.random.key(0), 5), []
    flow_matching_loss(
        lambda x, t: seen.append(x) or x, icfm(sigma=0.5), x0=x0, x1=x1, t=jnp.full(5, 0.5), keys=keys
    )
    np.testing.assert_allclose(seen[0], 0.5 * (x0 + x1) + 0.5 * noise.normal_like(keys, x0), atol=1e-6)


def test_what_was_learned_is_sampled_as_a_velocity():
    """An Euler step along the field, for a path that is not the straight one."""
    x1 = batch()[1]

    def net(x, told):
        return jnp.sin(x) + told[:, None, None]

    schedule, step = linear_flow(sigma_min=0.0), ddim().step
    denoise = make_denoiser(net, schedule, velocity, time_input(scale=1.0))
    for t, s in ((1.0, 0.8), (0.4, 0.3), (0.1, 0.0)):
        found, _ = step(denoise, schedule, x1, jnp.float32(t), jnp.float32(s), None, ())
        np.testing.assert_allclose(found, x1 + (s - t) * (jnp.sin(x1) + t), atol=1e-6)


def test_the_trigonometric_path_is_precise_near_the_source():
    t = jnp.asarray(1.0 - 2.0**-20, jnp.float32)
    x, _ = vp_cfm()(jnp.ones(()), jnp.zeros(()), t, jnp.zeros(()))
    np.testing.assert_allclose(x, np.sin(np.pi / 2 * 2.0**-20), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("icfm", -0.1), ("target_cfm", 1.0), ("schrodinger_bridge", 0.0), ("vp_cfm", -1.0)],
)
def test_a_bad_sigma_is_refused(name, sigma):
    with pytest.raises(ValueError, match=f"sigma is {sigma}; expected"):
        PATHS[name](sigma=sigma)
