import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import num_params, randomised, relative_error

from diffjax.models.autoencoder import Autoencoder, Gaussian, gaussian, tiled_decode, tiled_encode

TINY = Autoencoder(latent_channels=2, channels=(4, 8), blocks=3, groups=2, sample_size=16, shift_factor=0.3)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8, 3)), jnp.float32)
Z = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 10, 2)), jnp.float32)


@functools.cache
def params():
    return randomised(TINY, IMAGES)


def reconstruct(net, params):
    return net.apply({"params": params}, IMAGES)


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


def test_an_unrolled_loop_changes_nothing():
    outs = [
        jax.jit(functools.partial(reconstruct, net))(params())[0] for net in (TINY, TINY.clone(scan=False))
    ]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-5)


def test_remat_changes_nothing_but_memory():
    plain = TINY.clone(channels=(4,), blocks=2)
    params = randomised(plain, IMAGES)
    results = []
    for net in (plain, plain.clone(remat="full")):
        cost = jax.grad(lambda params, net=net: jnp.mean(reconstruct(net, params)[0] ** 2))
        assert ("remat" in str(jax.make_jaxpr(cost)(params))) == bool(net.remat)
        results.append(jax.tree.leaves(jax.jit(cost)(params)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.abs(b).max()) + 1e-7)


def test_bfloat16_is_near_float32_which_it_returns():
    high = jax.jit(functools.partial(reconstruct, TINY))(params())
    low = jax.jit(functools.partial(reconstruct, TINY.clone(dtype=jnp.bfloat16)))(params())
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert a.dtype == jnp.float32
        assert 1e-5 < relative_error(a, b) < 0.05


def test_each_half_works_with_its_own_parameters():
    decode = jax.jit(lambda params, z: TINY.apply({"params": params}, z, method="decode"))
    both, posterior = jax.jit(functools.partial(reconstruct, TINY))(params())
    encoder, decoder = ({half: params()[half]} for half in ("encoder", "decoder"))
    encoded = jax.jit(lambda params: TINY.apply({"params": params}, IMAGES, method="encode"))(encoder)
    for a, b in zip(encoded, posterior, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode(decoder, encoded.mean), both, rtol=1e-4, atol=1e-4)
    draw = jax.jit(lambda params, key: TINY.apply({"params": params}, IMAGES, key)[0])
    key = jax.random.key(0)
    np.testing.assert_allclose(
        draw(params(), key), decode(decoder, posterior.sample(key)), rtol=1e-4, atol=1e-4
    )


def test_an_image_that_fits_a_tile_is_not_changed_where_no_other_tile_is():
    out = tiled_decode(TINY, params(), Z[:, :6, :6], tile=16)  # a tile of 8 x 8, so the next begin at 6
    np.testing.assert_allclose(
        out, TINY.apply({"params": params()}, Z[:, :6, :6], method="decode"), atol=1e-5
    )
    with pytest.raises(ValueError, match="too small"):
        tiled_encode(TINY, params(), IMAGES, tile=1)


def test_tiles_inside_are_compiled_once():
    def convolutions(columns):
        z = jax.ShapeDtypeStruct((1, 6, columns, 2), jnp.float32)
        decode = lambda z: tiled_decode(TINY, params(), z, tile=16)  # noqa: E731
        return str(jax.make_jaxpr(decode)(z)).count("conv_general_dilated")

    assert convolutions(8 + 6) == convolutions(8 + 5 * 6)


@pytest.mark.parametrize(
    ("attributes", "count"),
    [
        ({}, 83_653_863),  # Stable Diffusion and SDXL
        (
            {"latent_channels": 16, "project_moments": False, "project_latents": False},
            83_819_683,
        ),  # SD3, FLUX
    ],
)
def test_published_sizes(attributes, count):
    assert num_params(Autoencoder(**attributes), jnp.zeros((1, 8, 8, 3))) == count
