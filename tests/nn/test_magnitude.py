import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.magnitude import (
    MagnitudeConv,
    MagnitudeDense,
    concatenate,
    fourier,
    mix,
    normalised,
    pixel_norm,
    silu,
)

X = jax.random.normal(jax.random.key(0), (4, 16, 16, 24))
Y = jax.random.normal(jax.random.key(1), (4, 16, 16, 8))
LAYERS = [MagnitudeDense(8), MagnitudeConv(8), MagnitudeConv(8, 1)]


def magnitude(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


@pytest.mark.parametrize(
    "operation",
    [
        silu,
        lambda x: mix(x, jnp.roll(x, 1, 0), 0.3),
        lambda x: concatenate(x, Y),
        lambda x: concatenate(x, Y, 0.2),
        lambda x: pixel_norm(7.0 * x),
    ],
)
def test_operations_keep_the_magnitude_of_independent_inputs(operation):
    assert abs(magnitude(operation(X)) - 1.0) < 0.02


def test_concatenation_weighs_what_is_wide_and_what_is_narrow_as_it_says():
    out = concatenate(X, Y, 0.2)
    energy = [float(jnp.sum(part**2)) for part in (out[..., :24], out[..., 24:])]
    np.testing.assert_allclose(energy[1] / energy[0], (0.2 / 0.8) ** 2, rtol=0.05)


def test_pixels_are_normed_one_by_one_and_zero_has_a_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(pixel_norm(x)[0], np.array([3.0, 4.0]) / np.sqrt(12.5), rtol=1e-4)
    assert np.isfinite(jax.grad(lambda x: pixel_norm(x).sum())(x)).all()


def test_fourier_features_have_magnitude_one_at_every_level():
    features = fourier(jnp.linspace(-2.0, 2.0, 101), 256)
    levels = jnp.sqrt(jnp.mean(features**2, axis=1))
    np.testing.assert_allclose(levels, 1.0, atol=0.1)
    np.testing.assert_allclose(magnitude(features), 1.0, atol=0.01)
    alike = np.asarray(features @ features.T) / 256
    assert np.abs(alike[0, 50:]).max() < 0.3  # levels that are far from each other do not look alike


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_keep_the_magnitude_whatever_the_length_of_their_weights(layer):
    params = layer.init(jax.random.key(2), X)["params"]
    weight = params["direction"].value
    out = layer.apply({"params": {"direction": weight}}, X)
    inside = out[:, 1:-1, 1:-1]  # padding adds zeros
    assert abs(magnitude(inside) - 1.0) < 0.1
    longer = layer.apply({"params": {"direction": 20.0 * weight}}, X)
    np.testing.assert_allclose(longer, out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_orthogonal_to_the_weights_of_each_output(layer):
    weight = layer.init(jax.random.key(2), X)["params"]["direction"].value
    cost = lambda weight: jnp.sum(jnp.sin(layer.apply({"params": {"direction": weight}}, X)))  # noqa: E731
    gradient = jax.grad(cost)(weight)
    axes = tuple(range(weight.ndim - 1))
    product = jnp.sum(gradient * weight, axes)
    lengths = jnp.sqrt(jnp.sum(gradient**2, axes) * jnp.sum(weight**2, axes))
    assert float(jnp.abs(product / lengths).max()) < 1e-3


@pytest.mark.parametrize("stacked", [(), (3,)])
@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 6, 5)])
def test_normalising_gives_each_output_a_weight_of_magnitude_one_and_the_same_direction(stacked, shape):
    weight = jax.random.normal(jax.random.key(0), (*stacked, *shape)) * jnp.arange(1.0, 6.0)
    params = {"a": {"direction": weight, "gain": jnp.full(stacked, 3.0)}, "kernel": jnp.full((2, 2), 4.0)}
    new = normalised(params)
    axes = tuple(range(-len(shape), -1))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(new["a"]["direction"] ** 2, axes)), 1.0, rtol=1e-3)
    ratio = np.asarray(new["a"]["direction"] / weight)
    np.testing.assert_allclose(
        ratio, np.broadcast_to(ratio.mean(axes, keepdims=True), ratio.shape), rtol=1e-4
    )
    np.testing.assert_array_equal(new["a"]["gain"], params["a"]["gain"])
    np.testing.assert_array_equal(new["kernel"], params["kernel"])
    np.testing.assert_allclose(normalised(new)["a"]["direction"], new["a"]["direction"], rtol=1e-3)
