import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from diffjax.diffusion.couplings import COUPLINGS, exact, sinkhorn, squared_distances

# ott-jax imports JAXopt, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")

KEY = jax.random.key(0)


def batch(size=16, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=(size, 2, 3)), jnp.float32) for _ in range(2))


def cost(x0, eps):
    return float(jnp.sum((x0 - eps) ** 2))


def distances(x0, eps):
    x0, eps = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (x0, eps))
    return ((x0[:, None] - eps[None]) ** 2).sum(-1)


def least_cost(x0, eps):
    between = distances(x0, eps)
    return between[linear_sum_assignment(between)].sum()


def partners(eps, coupled):
    """Which noise each image got; every row must be one of the batch's."""
    same = (np.asarray(coupled)[:, None] == np.asarray(eps)[None]).all(axis=(2, 3))
    assert (same.sum(axis=1) == 1).all()
    return same.argmax(axis=1)


@pytest.mark.parametrize("name", COUPLINGS)
def test_images_stay_and_noise_is_only_rearranged(name):
    x0, eps = batch()
    same, coupled = jax.jit(COUPLINGS[name]())(KEY, x0, eps)
    np.testing.assert_array_equal(same, x0)
    partners(eps, coupled)
    if name != "sinkhorn":  # which draws with replacement
        np.testing.assert_array_equal(np.sort(coupled, axis=0), np.sort(eps, axis=0))


@pytest.mark.parametrize("name", ["independent", "given"])
def test_pairs_are_left_as_they_are(name):
    x0, eps = batch()
    np.testing.assert_array_equal(COUPLINGS[name]()(KEY, x0, eps)[1], eps)


def test_distances():
    x0, eps = batch()
    np.testing.assert_allclose(squared_distances(x0, eps[:5]), distances(x0, eps[:5]), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 33])
def test_exact_has_the_least_cost(size):
    couple = jax.jit(exact())
    for seed in range(3):
        x0, eps = batch(size, seed)
        np.testing.assert_allclose(cost(*couple(KEY, x0, eps)), least_cost(x0, eps), rtol=1e-5)
    if size > 2:
        assert least_cost(x0, eps) < 0.8 * cost(x0, eps)


def test_exact_on_a_batch_that_is_split_over_devices():
    x0, eps = batch(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    found = jax.jit(exact(), out_shardings=split)(KEY, *jax.device_put((x0, eps), split))[1]
    np.testing.assert_array_equal(found, exact()(KEY, x0, eps)[1])


def test_a_sharp_sinkhorn_is_nearly_exact():
    x0, eps = batch()
    found = cost(*jax.jit(sinkhorn(epsilon=0.003))(KEY, x0, eps))
    np.testing.assert_allclose(found, least_cost(x0, eps), rtol=0.05)


@pytest.mark.parametrize("relative", [True, False])
def test_sinkhorn_draws_from_the_entropic_plan(relative):
    """The plan by Sinkhorn's iterations in float64; its share of a pair is how often the pair is drawn."""
    x0, eps = batch(6)
    between = distances(x0, eps)
    epsilon = 0.1
    blur = epsilon * between.mean() if relative else 8.0 * epsilon
    kernel, rows, columns = -between / blur, np.zeros(6), np.zeros(6)
    for _ in range(2000):
        rows = -np.log(6) - logsumexp(kernel + columns, axis=1)
        columns = -np.log(6) - logsumexp(kernel + rows[:, None], axis=0)
    plan = np.exp(kernel + rows[:, None] + columns)

    couple = sinkhorn(epsilon=epsilon if relative else 8.0 * epsilon, relative=relative, threshold=1e-4)
    draws = jax.jit(jax.vmap(lambda key: couple(key, x0, eps)[1]))(jax.random.split(KEY, 4000))
    counts = np.zeros((6, 6))
    for found in np.asarray(draws)[:4000]:
        same = (found[:, None] == np.asarray(eps)[None]).all(axis=(2, 3))
        counts += same
    np.testing.assert_allclose(counts / 4000 / 6, plan, atol=0.005)
    np.testing.assert_allclose(counts.sum(axis=0) / 4000, 1.0, atol=0.06)  # every noise has its equal share


def test_more_blur_costs_more():
    x0, eps = batch(64)
    costs = [cost(*jax.jit(sinkhorn(epsilon=epsilon))(KEY, x0, eps)) for epsilon in (0.01, 0.1, 100.0)]
    assert costs[0] < costs[1] < costs[2]
    np.testing.assert_allclose(costs[2], distances(x0, eps).mean() * 64, rtol=0.15)


def test_a_bad_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon is 0"):
        sinkhorn(epsilon=0.0)


@pytest.mark.parametrize("name", ["exact", "sinkhorn"])
def test_the_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[ot\]'"):
        COUPLINGS[name]()
