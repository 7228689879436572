import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import resampling

draw = jax.jit(resampling.draw, static_argnums=2)
update = jax.jit(resampling.update)


def loss(t):
    return jnp.exp(-6.0 * t) + 0.05


MEAN = (1.0 - np.exp(-6.0)) / 6.0 + 0.05  # the integral of `loss`


def filled(bins=20, length=4):
    """A history in which every bin has seen its own losses."""
    history = resampling.init(bins=bins, length=length)
    t = jnp.linspace(0.0, 1.0, 20 * bins * length + 1)[1:]
    return update(history, t, loss(t))


def test_times_are_uniform_until_every_history_is_full():
    history = resampling.init(bins=4, length=2)
    t = jnp.array([0.1, 0.1, 0.3, 0.3, 0.6, 0.6, 0.9])
    history = update(history, t, jnp.full(7, 5.0))
    np.testing.assert_array_equal(history.counts, [2, 2, 2, 1])
    np.testing.assert_allclose(resampling.probabilities(history), 0.25)
    drawn, weight = draw(history, jax.random.key(0), 20_000)
    np.testing.assert_allclose(weight, 1.0)
    shares, _ = np.histogram(drawn, bins=10, range=(0.0, 1.0))
    np.testing.assert_allclose(shares / 20_000, 0.1, atol=0.01)
    assert not np.allclose(resampling.probabilities(update(history, t[-1:], jnp.ones(1))), 0.25)


def test_probabilities_by_hand():
    history = resampling.LossHistory(jnp.array([[3.0, 5.0], [1.0, 1.0]]), jnp.array([2, 9]))
    root = 17.0**0.5
    expected = 0.9 * np.array([root, 1.0]) / (root + 1.0) + 0.05
    np.testing.assert_allclose(resampling.probabilities(history, uniform=0.1), expected, rtol=1e-6)
    nothing = resampling.LossHistory(jnp.zeros((2, 2)), jnp.array([2, 9]))
    np.testing.assert_allclose(resampling.probabilities(nothing), 0.5)


def test_the_weighted_mean_is_that_of_uniform_times_with_less_variance():
    count = 100_000
    t, weight = draw(filled(), jax.random.key(0), count)
    assert t.min() > 0.0
    assert t.max() < 1.0
    terms = np.asarray(weight * loss(t), np.float64)
    plain = np.asarray(loss(jax.random.uniform(jax.random.key(1), (count,))), np.float64)
    assert abs(terms.mean() - MEAN) < 4.0 * terms.std() / count**0.5
    assert terms.var() < 0.1 * plain.var()
    np.testing.assert_allclose(np.mean(weight), 1.0, atol=0.02)


def test_updates_of_whole_batches_are_those_of_one_example_after_another():
    bins, length = 5, 3
    random = np.random.default_rng(0)
    whole = single = resampling.init(bins=bins, length=length)
    expected = {k: [] for k in range(bins)}
    for _ in range(4):
        # Bin 1 is met more often in a batch than its history is long.
        t = np.where(random.random(9) < 0.5, 0.3, random.uniform(0.01, 1.0, 9)).astype(np.float32)
        losses = random.normal(size=9).astype(np.float32)
        whole = update(whole, t, losses)
        for time, value in zip(t, losses, strict=True):
            single = update(single, time[None], value[None])
            expected[int(np.ceil(time * bins)) - 1].append(value)
    np.testing.assert_array_equal(whole.losses, single.losses)
    np.testing.assert_array_equal(whole.counts, [len(seen) for seen in expected.values()])
    for k, seen in expected.items():
        latest = np.zeros(length, np.float32)
        latest[: len(seen[-length:])] = seen[-length:]
        np.testing.assert_array_equal(np.sort(whole.losses[k]), np.sort(latest))


def test_a_grid_of_as_many_steps_as_bins_has_a_bin_for_each():
    t = jnp.arange(1, 1001, dtype=jnp.float32) / 1000
    history = update(resampling.init(bins=1000, length=1), t, jnp.arange(1000.0))
    np.testing.assert_array_equal(history.counts, 1)
    np.testing.assert_array_equal(history.losses[:, 0], np.arange(1000.0))


def test_losses_that_are_not_finite_are_left_out():
    t = jnp.full(3, 0.3)
    history = update(resampling.init(bins=2, length=2), t, jnp.array([1.0, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(history.counts, [1, 0])
    np.testing.assert_array_equal(history.losses, [[1.0, 0.0], [0.0, 0.0]])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="bins is 0"):
        resampling.init(bins=0)
