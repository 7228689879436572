import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser, gaussian_flow

from diffjax.diffusion.adaptive import ADAPTIVE, adaptive
from diffjax.diffusion.schedules import cosine, linear_flow, vp

MEAN, STD, END = 0.3, 0.5, 0.01

each_schedule = pytest.mark.parametrize("schedule", [cosine(), vp()], ids=["cosine", "vp"])


def images():
    return jnp.linspace(-2.0, 2.0, 8).reshape(4, 2)


@functools.cache
def runner(schedule, solver="dopri5"):
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    return jax.jit(
        lambda x, start, end, tolerance: adaptive(
            denoise, schedule, x, start=start, end=end, solver=solver, rtol=tolerance, atol=tolerance
        )
    )


@each_schedule
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_it_follows_the_exact_flow(schedule, solver):
    expected = gaussian_flow(schedule, MEAN, STD, images(), 1.0, END)
    run = runner(schedule, solver)
    errors = [np.abs(run(images(), 1.0, END, tolerance) - expected).max() for tolerance in (1e-2, 1e-5)]
    assert errors[1] < 1e-4
    assert errors[1] < 0.2 * errors[0]


@each_schedule
def test_there_and_back(schedule):
    run = runner(schedule, "dopri5")
    data = run(images(), 1.0, END, 1e-5)
    np.testing.assert_allclose(run(data, END, 1.0, 1e-5), images(), atol=1e-3)


def test_the_worst_example_decides_the_steps():
    """The others of a batch, where nothing happens, must not hide its error."""
    schedule = linear_flow()

    def one_is_curved(x, t):
        estimate = gaussian_denoiser(schedule, MEAN, STD)(x, t)
        still = (jnp.arange(len(x)) > 0)[:, None]
        return estimate._replace(
            x0=jnp.where(still, 0.0, estimate.x0), eps=jnp.where(still, 0.0, estimate.eps)
        )

    def error(count):
        x = jnp.full((count, 2), 2.0)
        found = jax.jit(lambda x: adaptive(one_is_curved, schedule, x, end=END, rtol=1e-3, atol=1e-3))(x)[:1]
        return np.abs(found - gaussian_flow(schedule, MEAN, STD, x[:1], 1.0, END)).max()

    np.testing.assert_allclose(error(256), error(1), rtol=1e-2)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="solver is 'euler'; expected one of dopri5, tsit5"):
        adaptive(None, cosine(), images(), end=END, solver="euler")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[ode\]'"):
        adaptive(None, cosine(), images(), end=END)
