import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import compiled
from tiny_networks import NETWORKS

from diffjax.models.autoencoder import Autoencoder, Gaussian, gaussian, tiled_decode, tiled_encode

TINY, PARAMS, (IMAGES,) = (getattr(NETWORKS["autoencoder"], name) for name in ("net", "params", "inputs"))
Z = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 10, 2)), jnp.float32)


def test_gaussian_is_split_clipped_drawn_and_compared_with_the_standard_normal():
    split = gaussian(jnp.array([1.0, 2.0, -40.0, 30.0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(split.mean.ravel(), [1.0, 2.0])
    np.testing.assert_array_equal(split.logvar.ravel(), [-30.0, 20.0])

    wide = Gaussian(jnp.full((2, 64, 64, 1), 3.0), jnp.full((2, 64, 64, 1), np.log(4.0)))
    draw = wide.sample(jax.random.key(0))
    assert abs(float(draw.mean()) - 3.0) < 0.1
    assert abs(float(draw.std()) - 2.0) < 0.1
    np.testing.assert_allclose(wide.kl(), 64 * 64 * 0.5 * (9.0 + 4.0 - 1.0 - np.log(4.0)), rtol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "shift", "scale"),
    [
        ({"shift_factor": 0.3, "scaling_factor": 2.0}, 0.3, 2.0),
        ({"scaling_factor": 0.5, "latents_mean": (1.0, 2.0), "latents_std": (4.0, 5.0)},
         np.array([1.0, 2.0]), 0.5 / np.array([4.0, 5.0])),
    ],
)  # fmt: skip
def test_latents_are_shifted_and_scaled_without_parameters(attributes, shift, scale):
    net = Autoencoder(**attributes)
    np.testing.assert_allclose(net.to_latents(Z), (np.asarray(Z) - shift) * scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.from_latents(net.to_latents(Z)), Z, rtol=1e-5, atol=1e-6)


def test_each_half_works_with_its_own_parameters():
    decode = jax.jit(lambda params, z: TINY.apply({"params": params}, z, method="decode"))
    both, posterior = compiled(TINY)(PARAMS, IMAGES)
    encoder, decoder = ({half: PARAMS[half]} for half in ("encoder", "decoder"))
    encoded = jax.jit(lambda params: TINY.apply({"params": params}, IMAGES, method="encode"))(encoder)
    for a, b in zip(encoded, posterior, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode(decoder, encoded.mean), both, rtol=1e-4, atol=1e-4)
    key = jax.random.key(0)
    np.testing.assert_allclose(
        compiled(TINY)(PARAMS, IMAGES, key)[0], decode(decoder, posterior.sample(key)), rtol=1e-4, atol=1e-4
    )


def test_an_image_that_fits_a_tile_is_not_changed_where_no_other_tile_is():
    out = tiled_decode(TINY, PARAMS, Z[:, :6, :6], tile=16)  # a tile of 8 x 8, so the next begin at 6
    np.testing.assert_allclose(out, TINY.apply({"params": PARAMS}, Z[:, :6, :6], method="decode"), atol=1e-5)
    with pytest.raises(ValueError, match="too small"):
        tiled_encode(TINY, PARAMS, IMAGES, tile=1)


def test_tiles_inside_are_compiled_once():
    def convolutions(columns):
        z = jax.ShapeDtypeStruct((1, 6, columns, 2), jnp.float32)
        decode = lambda z: tiled_decode(TINY, PARAMS, z, tile=16)  # noqa: E731
        return str(jax.make_jaxpr(decode)(z)).count("conv_general_dilated")

    assert convolutions(8 + 6) == convolutions(8 + 5 * 6)
