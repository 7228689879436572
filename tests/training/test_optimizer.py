import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.training.optimizer import OPTIMIZERS, adamw, learning_rate_schedule


def rates(count, **options):
    schedule = learning_rate_schedule(**{"peak": 2.0, "steps": 20, "warmup_steps": 4} | options)
    return [float(schedule(step)) for step in range(count)]


def test_warm_up_is_linear_from_the_first_update_to_the_peak():
    np.testing.assert_allclose(rates(5, decay="constant"), [0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_goes_from_the_peak_to_its_final_fraction():
    expected = [1 + math.cos(math.pi * i / 16) for i in range(17)]
    np.testing.assert_allclose(rates(21)[4:], expected, atol=1e-6)
    assert rates(21, final_fraction=0.25)[-1] == pytest.approx(0.5)


def test_constant_stays():
    assert set(rates(40, decay="constant")[4:]) == {2.0}


@pytest.mark.parametrize("warmup_steps", [0, 1, 19, 20, 1000])
def test_any_warm_up_gives_finite_positive_rates(warmup_steps):
    found = rates(20, warmup_steps=warmup_steps)
    assert all(0 < rate <= 2.0 for rate in found)
    assert max(found) == pytest.approx(2.0)


def test_one_step_is_a_run():
    assert rates(1, steps=1) == [2.0]


def test_an_unknown_decay_is_named():
    with pytest.raises(ValueError, match="'linear'"):
        rates(1, decay="linear")


def first_update(gradient, **options):
    return first_updates(gradient, ("kernel",), **options)["kernel"]


def first_updates(gradient, names, make=adamw, **options):
    optimizer = make(optax.constant_schedule(0.1), **options)
    params = {name: jnp.asarray([2.0, -2.0]) for name in names}
    gradients = {name: jnp.asarray(gradient) for name in names}
    updates, _ = optimizer.update({"layer": gradients}, optimizer.init({"layer": params}), {"layer": params})
    return jax.tree.map(np.asarray, updates["layer"])


def test_the_first_update_is_the_rate_against_the_sign_of_the_gradient():
    np.testing.assert_allclose(first_update([0.3, -0.4]), [-0.1, 0.1], rtol=1e-5)


def test_weight_decay_is_decoupled_from_the_gradient():
    np.testing.assert_allclose(first_update([0.3, -0.4], weight_decay=0.5), [-0.2, 0.2], rtol=1e-5)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weight_decay_leaves_biases_and_tables_alone(make):
    names = ("kernel", "bias", "scale", "positions")
    plain, decayed = (first_updates([0.3, -0.4], names, make, weight_decay=decay) for decay in (0.0, 0.5))
    assert np.abs(decayed["kernel"] - plain["kernel"]).min() > 1e-3
    for name in names[1:]:
        np.testing.assert_array_equal(decayed[name], plain[name])


def test_gradients_are_clipped_by_their_global_norm():
    # Adam's memory shows what reached it: (1 - b1) times the clipped gradient.
    optimizer = adamw(optax.constant_schedule(0.1), b1=0.9, clip_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for gradient, expected in (((30.0, 40.0), (0.06, 0.08)), ((0.3, 0.4), (0.03, 0.04))):
        grads = {"a": jnp.asarray([gradient[0]]), "b": jnp.asarray([gradient[1]])}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        mu = optax.tree_utils.tree_get(state, "mu")
        np.testing.assert_allclose([mu["a"][0], mu["b"][0]], expected, rtol=1e-5)
