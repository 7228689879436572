import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.resblock import AttentionBlock, Downsample, ResBlock, Upsample, add_scaled, fitting_norm


def randomised(module, *inputs):
    """Parameters without a zero in them: zero-initialised branches would hide every mistake inside them."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.3, leaf.shape), jnp.float32), shapes)


def run(module, params, *inputs, **kwargs):
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, **kwargs))(
        params, *inputs
    )


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("features", "groups"),
    [(3, 1), (4, 1), (8, 2), (30, 6), (32, 8), (48, 12), (128, 32), (384, 32), (640, 32)],
)
def test_fitting_norm_always_divides(features, groups):
    norm = fitting_norm(features)
    assert norm.groups == groups
    assert features % norm.groups == 0


def test_fitting_norm_is_float32_and_matches_its_definition():
    x = 3.0 + 2.0 * normal(0, 2, 3, 5, 8)
    params = randomised(fitting_norm(8), x)
    y = run(fitting_norm(8), params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.float32

    grouped = np.asarray(x.astype(jnp.bfloat16), np.float64).reshape(2, 15, 2, 4)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    deviation = np.sqrt(grouped.var(axis=(1, 3), keepdims=True) + 1e-6)
    expected = ((grouped - mean) / deviation).reshape(x.shape) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_add_scaled_keeps_the_variance():
    y = add_scaled(normal(0, 4, 32, 32, 4), normal(1, 4, 32, 32, 4))
    assert abs(float(y.var()) - 1.0) < 0.05


@pytest.mark.parametrize("features", [8, 16])
def test_res_block_matches_its_formula(features):
    x, vector = normal(0, 2, 6, 4, 8), normal(1, 2, 12)
    p = randomised(ResBlock(features), x, vector)

    @jax.jit
    def convolve(kernel, h):
        h = jax.lax.conv_general_dilated(
            h, kernel["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return h + kernel["bias"]

    def norm(params, h):
        return run(fitting_norm(h.shape[-1]), params, h)

    h = convolve(p["conv_in"], jax.nn.silu(norm(p["norm_in"], x)))
    dense = p["norm_out"]["modulation"]
    modulation = jax.nn.silu(vector) @ dense["kernel"] + dense["bias"]
    scale, shift = modulation[:, :features], modulation[:, features:]
    h = norm(p["norm_out"]["norm"], h) * (1 + scale[:, None, None]) + shift[:, None, None]
    h = convolve(p["conv_out"], jax.nn.silu(h))
    skip = x if features == 8 else convolve(p["skip"], x)
    assert ("skip" in p) == (features != 8)
    actual = run(ResBlock(features), p, x, vector)
    chex.assert_trees_all_close(actual, skip + h, atol=2e-5)


def test_blocks_begin_as_the_identity():
    x, vector, tokens, mask = (
        normal(0, 2, 4, 4, 8),
        normal(1, 2, 12),
        normal(2, 2, 3, 5),
        jnp.ones((2, 3), bool),
    )
    res = ResBlock(8)
    y, _ = jax.jit(res.init_with_output)(jax.random.key(0), x, vector)
    chex.assert_trees_all_equal(y, x)
    attention = AttentionBlock(2, self_attention=True, cross_attention=True)
    y, _ = jax.jit(attention.init_with_output)(jax.random.key(0), x, tokens, mask)
    chex.assert_trees_all_equal(y, x)


def test_dropout_draws_from_its_rng_only_above_zero():
    x, vector = normal(0, 2, 4, 4, 8), normal(1, 2, 12)
    params = randomised(ResBlock(8), x, vector)
    plain = run(ResBlock(8), params, x, vector)  # asks for no rng
    block = ResBlock(8, dropout=0.5)
    first = run(block, params, x, vector, rngs={"dropout": jax.random.key(1)})
    second = run(block, params, x, vector, rngs={"dropout": jax.random.key(2)})
    assert float(jnp.abs(first - second).max()) > 1e-3
    assert float(jnp.abs(first - plain).max()) > 1e-3


@pytest.mark.parametrize(("over_self", "over_text"), [(True, False), (False, True), (True, True)])
def test_attention_block_attends_to_what_it_says(over_self, over_text):
    x, tokens = normal(0, 2, 4, 6, 8), normal(1, 2, 3, 5)
    mask = jnp.array([[True, True, False], [True, False, False]])
    block = AttentionBlock(2, self_attention=over_self, cross_attention=over_text)
    params = randomised(block, x, tokens, mask)
    apply = jax.jit(lambda x, tokens: block.apply({"params": params}, x, tokens, mask))
    y = apply(x, tokens)
    chex.assert_shape(y, x.shape)

    chex.assert_trees_all_equal(apply(x, tokens.at[0, 2].set(9.0)), y)  # masked out
    with_other_text = apply(x, tokens.at[0, 1, 0].set(9.0))
    assert (float(jnp.abs(with_other_text - y)[0].max()) > 1e-4) == over_text
    chex.assert_trees_all_equal(with_other_text[1], y[1])
    with_other_corner = apply(x.at[0, 0, 0, 0].set(9.0), tokens)
    assert (float(jnp.abs(with_other_corner - y)[0, 3, 5].max()) > 1e-5) == over_self  # from corner to corner
    chex.assert_trees_all_equal(with_other_corner[1], y[1])


def test_attention_block_needs_no_text_for_self_attention():
    x = normal(0, 2, 2, 2, 8)
    params = randomised(AttentionBlock(2), x)
    chex.assert_shape(run(AttentionBlock(2), params, x), x.shape)


@pytest.mark.parametrize("stride", [2, 3])
def test_resampling_changes_the_resolution(stride):
    x = normal(0, 2, 2 * stride, stride, 8)
    params = randomised(Downsample(12, stride), x)
    chex.assert_shape(run(Downsample(12, stride), params, x), (2, 2, 1, 12))
    params = randomised(Upsample(12, stride), x)
    chex.assert_shape(run(Upsample(12, stride), params, x), (2, 2 * stride**2, stride**2, 12))


def test_upsample_begins_as_nearest_neighbour_and_puts_each_place_where_it_belongs():
    x = normal(0, 2, 3, 5, 8)
    upsample = Upsample(4, 2)
    y, _ = jax.jit(upsample.init_with_output)(jax.random.key(0), x)
    chex.assert_trees_all_close(y, jnp.repeat(jnp.repeat(y[:, ::2, ::2], 2, axis=1), 2, axis=2), atol=1e-6)
    assert float(jnp.abs(y).max()) > 0.1

    params = randomised(upsample, x)
    y = run(upsample, params, x)
    kernel = params["conv"]["kernel"][0, 0].reshape(8, 2, 2, 4)
    bias = params["conv"]["bias"].reshape(2, 2, 4)
    for row, column in np.ndindex(2, 2):
        expected = x @ kernel[:, row, column] + bias[row, column]
        chex.assert_trees_all_close(y[:, row::2, column::2], expected, atol=1e-5)


@pytest.mark.parametrize("module", [Downsample(8, 2, dtype=jnp.bfloat16), Upsample(8, 2, jnp.bfloat16)])
def test_resampling_computes_in_its_dtype(module):
    x = normal(0, 2, 4, 4, 8)
    assert run(module, randomised(module, x), x).dtype == jnp.bfloat16
