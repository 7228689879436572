import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.training import ema


def test_the_average_of_a_constant_decay_has_a_closed_form():
    values, decay = np.random.default_rng(0).normal(size=12), 0.8
    average = jnp.asarray(1.0)
    for value in values:
        average = ema.update(average, jnp.asarray(value), jnp.asarray(decay))
    powers = decay ** np.arange(len(values) - 1, -1, -1)
    expected = decay ** len(values) + (1 - decay) * (powers * values).sum()
    assert float(average) == pytest.approx(expected, rel=1e-5)


def test_trees_are_averaged_leaf_by_leaf():
    average = ema.update(
        {"a": jnp.asarray(0.0), "b": jnp.asarray(2.0)}, {"a": 1.0, "b": 4.0}, jnp.asarray(0.5)
    )
    assert (float(average["a"]), float(average["b"])) == (0.5, 3.0)


def test_a_young_average_forgets_its_start():
    decays = [float(ema.decay_at(jnp.asarray(step), 0.999)) for step in (0, 1, 8, 90, 10**6)]
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 0.5, 0.91, 0.999], rtol=1e-6)
