import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import levels

EDGES = (-10.0, -2.5, 0.0, 10.0)


def test_losses_are_summed_by_their_level():
    losses = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    level = jnp.array([-9.0, 0.0, 3.0, -jnp.inf, jnp.inf, 50.0])
    sums, counts = jax.jit(lambda loss, level: levels.by_level(loss, level, EDGES))(losses, level)
    np.testing.assert_array_equal(sums, [9.0, 0.0, 54.0])
    np.testing.assert_array_equal(counts, [2.0, 0.0, 4.0])


def test_sums_and_counts_are_those_of_numpy():
    random = np.random.default_rng(0)
    losses, level = random.random(500).astype(np.float32), random.uniform(-10, 10, 500).astype(np.float32)
    sums, counts = levels.by_level(jnp.asarray(losses), jnp.asarray(level), np.linspace(-10.0, 10.0, 9))
    np.testing.assert_array_equal(counts, np.histogram(level, bins=8, range=(-10, 10))[0])
    np.testing.assert_allclose(
        sums, np.histogram(level, bins=8, range=(-10, 10), weights=losses)[0], rtol=1e-5
    )


def test_one_bin_takes_everything():
    sums, counts = levels.by_level(jnp.arange(3.0), jnp.arange(3.0), (0.0, 1.0))
    assert (float(sums[0]), float(counts[0])) == (3.0, 3.0)


def test_a_loss_that_is_not_finite_stays_in_its_bin():
    sums, _ = levels.by_level(jnp.array([1.0, jnp.nan]), jnp.array([-5.0, 5.0]), EDGES)
    np.testing.assert_array_equal(sums, [1.0, 0.0, jnp.nan])


def test_every_bin_has_a_name():
    assert levels.level_names(EDGES, prefix="loss") == ("loss/-10_to_-2.5", "loss/-2.5_to_0", "loss/0_to_10")


@pytest.mark.parametrize("edges", [(1.0,), (0.0, 0.0), (1.0, 0.0)])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(ValueError, match="rising"):
        levels.by_level(jnp.ones(1), jnp.ones(1), edges)


@pytest.mark.parametrize("loss", [1e-3, 0.4, 20.0])
def test_learned_uncertainty_is_least_at_the_logarithm_of_the_loss(loss):
    best = jnp.log(loss)
    value, slope = jax.value_and_grad(levels.uncertain, argnums=1)(jnp.asarray(loss), best)
    np.testing.assert_allclose(value, 1.0 + np.log(loss), rtol=1e-6)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    around = levels.uncertain(jnp.asarray(loss), best + jnp.linspace(-1.0, 1.0, 20))
    assert (around > value).all()
    # There the network sees the loss divided by itself, whatever its size.
    weight = jax.grad(levels.uncertain)(jnp.asarray(loss), best)
    np.testing.assert_allclose(weight * loss, 1.0, rtol=1e-6)
