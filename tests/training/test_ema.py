from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.training import ema

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "training_maths.npz")


def profile(tau, step, gamma):
    """The weight of time tau in the power-function average at `step`: EDM2's definition."""
    return np.where(tau <= step, (gamma + 1.0) * tau**gamma / step ** (gamma + 1.0), 0.0)


def track(values, sigma_rel):
    """The average of a run after each update, in float64."""
    with jax.enable_x64(True):
        decay = ema.power_function(sigma_rel=sigma_rel)

        def update(average, at):
            step, value = at
            average = ema.update(average, value, decay(step))
            return average, average

        steps = jnp.arange(len(values))
        return np.asarray(
            jax.lax.scan(update, jnp.full_like(values[0], 1e6), (steps, jnp.asarray(values)))[1]
        )


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


@pytest.mark.parametrize("name", ema.DECAYS)
def test_decays_rise_within_the_unit_interval(name):
    decay = jax.jit(ema.DECAYS[name]())(jnp.arange(0, 1_000_000, 997))
    assert decay.dtype == jnp.float32
    assert decay[0] >= 0.0
    assert decay[-1] <= 1.0
    assert (np.diff(decay) >= 0.0).all()


def test_decays_are_those_of_diffusers():
    steps = jnp.asarray(GOLDEN["ema/step"]) - 1
    # It replaces the average at its first update, where TensorFlow's rule has 1 / 10.
    np.testing.assert_allclose(ema.warm(decay=0.9999)(steps)[1:], GOLDEN["ema/warm"][1:], rtol=1e-6)
    ours = ema.inverse_power(decay=0.9999, inv_gamma=2.0, power=0.75)(steps)
    np.testing.assert_allclose(1.0 - ours, 1.0 - GOLDEN["ema/inverse_power"], rtol=1e-5, atol=1e-7)


def test_power_functions_are_those_of_ema_pytorch():
    steps = jnp.asarray(GOLDEN["ema/step"]) - 1
    for sigma_rel, gamma, beta in zip(
        GOLDEN["ema/sigma_rel"], GOLDEN["ema/gamma"], GOLDEN["ema/beta"], strict=True
    ):
        assert ema.gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-9)
        np.testing.assert_allclose(ema.power_function(sigma_rel=sigma_rel)(steps), beta, rtol=2e-5)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.01, 0.05, 0.1, 0.25, 0.2886])
def test_the_exponent_gives_the_width(sigma_rel):
    gamma = ema.gamma_of(sigma_rel)
    # Mean and second moment of the profile on [0, 1] are those of a beta distribution.
    mean, second = (gamma + 1.0) / (gamma + 2.0), (gamma + 1.0) / (gamma + 3.0)
    assert gamma >= 0.0
    assert (second - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_the_average_is_the_integral_of_its_profile(sigma_rel):
    count, gamma = 50, ema.gamma_of(sigma_rel)
    weights = track(np.eye(count), sigma_rel)[-1]  # of each value in the last average
    tau = (np.arange(2000) + 0.5) / 2000
    steps = np.arange(count)[:, None] + tau
    expected = profile(steps, count, gamma).mean(axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-12)


def test_profiles_multiply_as_their_integrals():
    steps, gammas = np.array([3.0, 5.0, 5.0, 8.0]), np.array([6.9, 1.5, 16.9, 0.0])
    tau = (np.arange(200_000) + 0.5) / 200_000 * 8.0
    curves = profile(tau, steps[:, None], gammas[:, None])
    expected = curves @ curves.T * (8.0 / 200_000)
    products = ema._product(steps[:, None], gammas[:, None], steps, gammas)
    np.testing.assert_allclose(products, expected, rtol=1e-4)


def test_reconstruction_weights_are_those_of_ema_pytorch():
    targets = zip(GOLDEN["posthoc/target_steps"], GOLDEN["posthoc/target_gammas"], strict=True)
    for (step, gamma), theirs in zip(targets, GOLDEN["posthoc/weights"].T, strict=True):
        ours = ema.reconstruction_weights(GOLDEN["posthoc/steps"], GOLDEN["posthoc/gammas"], step, gamma)
        # Theirs do not sum to one; the authors' do.
        np.testing.assert_allclose(ours, theirs / theirs.sum(), rtol=1e-6, atol=1e-9)


def test_a_snapshot_is_reconstructed_from_itself():
    steps, gammas = np.array([10.0, 20.0, 10.0, 20.0]), np.array([17.0, 17.0, 7.0, 7.0])
    weights = ema.reconstruction_weights(steps, gammas, 20.0, 7.0)
    np.testing.assert_allclose(weights, [0.0, 0.0, 0.0, 1.0], atol=1e-9)


def test_many_snapshots_of_a_long_run_are_stable():
    steps = np.tile(np.linspace(1e4, 2e6, 200), 2)
    gammas = np.repeat([ema.gamma_of(0.05), ema.gamma_of(0.1)], 200)
    gamma = ema.gamma_of(0.08)
    weights = ema.reconstruction_weights(steps, gammas, 2e6, gamma)
    assert np.abs(weights).max() < 10.0
    tau = (np.arange(4000) + 0.5) / 4000 * 2e6
    curve = weights @ profile(tau, steps[:, None], gammas[:, None])
    wanted = profile(tau, 2e6, gamma)
    assert np.linalg.norm(curve - wanted) < 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("sigma_rel", "last"), [(0.07, 600), (0.12, 600), (0.08, 450)])
def test_an_average_that_was_not_kept_is_recovered(sigma_rel, last):
    count, every = 600, 50
    values = np.cumsum(np.random.default_rng(0).normal(size=(count, 3)), axis=0)  # a run that wanders
    kept = [0.05, 0.1]
    tracks = [track(values, width) for width in kept]
    steps = np.tile(np.arange(every, count + 1, every), 2)
    gammas = np.repeat([ema.gamma_of(width) for width in kept], count // every)
    trees = ({"a": {"b": average[step - 1]}} for average in tracks for step in steps[: count // every])
    weights = ema.reconstruction_weights(steps, gammas, last, ema.gamma_of(sigma_rel))
    direct = track(values, sigma_rel)[last - 1]
    error = np.abs(ema.reconstruct(trees, weights)["a"]["b"] - direct).max()
    nearest = min(np.abs(average[last - 1] - direct).max() for average in tracks)
    assert error < 0.05 * nearest


def test_reconstruction_keeps_types_and_adds_in_float64():
    trees = [{"a": jnp.full(2, 3.0, jnp.bfloat16), "b": np.full(1, 3.0, np.float32)}] * 2
    tree = ema.reconstruct(trees, [1e8 + 1.0, -1e8])  # which float32 takes for opposites
    assert (tree["a"].dtype, tree["b"].dtype) == (jnp.bfloat16, np.float32)
    np.testing.assert_array_equal(tree["a"].astype(np.float32), 3.0)
    np.testing.assert_array_equal(tree["b"], 3.0)
    with pytest.raises(ValueError, match="argument"):
        ema.reconstruct(trees[:1], np.ones(2))


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (ema.warm, {"decay": 1.0}),
        (ema.inverse_power, {"power": 0.0}),
        (ema.inverse_power, {"decay": -0.1}),
        (ema.power_function, {"sigma_rel": 0.3}),
        (ema.gamma_of, {"sigma_rel": 0.0}),
    ],
)
def test_impossible_settings_are_refused(function, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*expected"):
        function(**settings)


def test_there_is_no_average_of_a_time_after_the_last_snapshot():
    with pytest.raises(ValueError, match="target_step is 30"):
        ema.reconstruction_weights(np.array([10.0, 20.0]), np.array([7.0, 17.0]), 30.0, 10.0)


def test_the_error_of_a_reconstruction_is_that_of_its_profile():
    steps, gammas = np.array([400.0, 700.0, 1000.0]), np.full(3, 6.0)
    weights = ema.reconstruction_weights(steps, gammas, 1000.0, 12.0)
    times = np.linspace(0.0, 1000.0, 200_001)
    wanted = profile(times, 1000.0, 12.0)
    found = sum(w * profile(times, step, 6.0) for w, step in zip(weights, steps, strict=True))
    expected = np.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum())
    error = ema.reconstruction_error(steps, gammas, weights, 1000.0, 12.0)
    assert error == pytest.approx(expected, rel=1e-3)
    assert 0.1 < error < 0.5  # one width of average alone does not reach far
    assert ema.reconstruction_error(steps, gammas, np.array([0.0, 0.0, 1.0]), 1000.0, 6.0) < 1e-6
