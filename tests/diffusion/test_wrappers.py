import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import grids, noise
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import cosine, edm
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.solvers.base import Solver, no_memory
from diffjax.diffusion.solvers.wrappers import jumping

KEYS = jax.random.split(jax.random.key(0), 2)
STILL = Solver(lambda x, times: jnp.int32(0), lambda d, c, x, t, s, k, carry: (x, carry + 1), 1)


@pytest.mark.parametrize(("t", "s"), [(0.1, 0.9), (0.4, 0.5), (0.0, 1.0)])
def test_a_step_up_is_the_forward_process(t, s, monkeypatch):
    """What is distributed as the data at t is distributed as the data at s: mean and variance by hand."""
    schedule, solver, x = cosine(), jumping(STILL), jnp.array([[0.7], [-1.2]])
    now, then = schedule(jnp.float32(t)), schedule(jnp.float32(s))

    def up(z):
        monkeypatch.setattr(noise, "normal_like", lambda keys, x, draw=0: jnp.full_like(x, z))
        return solver.step(None, schedule, x, jnp.float32(t), jnp.float32(s), KEYS, solver.init(x, None))[0]

    mean, spread = up(0.0), up(1.0) - up(0.0)
    np.testing.assert_allclose(mean, then.alpha / now.alpha * x, rtol=1e-5)
    # alpha_t x0 + sigma_t eps becomes alpha_s x0 and noise of variance sigma_s^2.
    np.testing.assert_allclose(
        (then.alpha / now.alpha * now.sigma) ** 2 + spread**2, then.sigma**2, rtol=1e-4
    )


def test_a_step_up_begins_the_memory_anew_and_a_step_down_does_not():
    solver, x = jumping(STILL), jnp.zeros((2, 1))
    carry = solver.init(x, None)
    for t, s, expected in ((0.9, 0.5, 1), (0.5, 0.2, 2), (0.2, 0.5, 0), (0.5, 0.2, 1)):
        _, carry = solver.step(None, cosine(), x, jnp.float32(t), jnp.float32(s), KEYS, carry)
        assert int(carry[1]) == expected


def test_only_solvers_that_jump_may_go_up():
    times = np.array([1.0, 0.3, 0.6, 0.1])
    still = Solver(no_memory, lambda d, c, x, t, s, k, carry: (x, carry), 1)
    assert sample(None, cosine(), jumping(still), keys=KEYS, shape=(1,), times=times).shape == (2, 1)
    with pytest.raises(ValueError, match=r"times must decrease, but 0.3 is followed by 0.6"):
        sample(None, cosine(), still, keys=KEYS, shape=(1,), times=times)


def test_the_restart_grid_goes_back_as_often_as_it_is_told():
    schedule = edm(sigma_max=80.0)
    grid = grids.restart(restart_min=0.5, restart_max=4.0, restart_steps=3, repeats=2)
    sigmas = 80.0 * grid(schedule, 10)
    ups = np.flatnonzero(np.diff(sigmas) > 0.0)
    assert len(ups) == 2
    np.testing.assert_allclose(sigmas[ups + 1], 4.0, rtol=1e-5)
    np.testing.assert_allclose(sigmas[ups[0]], sigmas[ups[1]], rtol=1e-5)
    assert 0.5 <= sigmas[ups[0]] < 2.0
    np.testing.assert_array_equal(np.diff(ups), 4)  # up, and three steps down
    np.testing.assert_allclose(sigmas[[0, -2, -1]], [80.0, 0.002, 0.0], rtol=1e-4)
    assert SOLVERS["restart"]().rises
