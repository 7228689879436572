from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.attention import Attention
from diffjax.nn.rotary import rotary, rotate

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "blocks.npz")
WIDTHS = (4, 6, 6)  # those of the golden case


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_it_agrees_with_diffusers_flux():
    by = rotary(jnp.asarray(GOLDEN["rotary/positions"]), WIDTHS)
    assert by.cos.shape == by.sin.shape == (8, 8)
    turned = rotate(jnp.asarray(GOLDEN["rotary/x"]), by)
    np.testing.assert_allclose(turned, GOLDEN["rotary/turned"], atol=1e-5)


def test_a_pair_of_features_is_a_complex_number_that_is_turned():
    positions = np.array([[0.0, 3.0], [5.0, 1.0], [-2.0, 0.5]])
    x = np.asarray(normal(0, 2, 3, 4, 10), np.float64)
    frequencies = np.concatenate([100.0 ** (-np.arange(2) / 2), 100.0 ** (-np.arange(3) / 3)])
    angles = positions[:, [0, 0, 1, 1, 1]] * frequencies
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    turned = np.asarray(
        rotate(jnp.asarray(x, jnp.float32), rotary(jnp.asarray(positions), (4, 6), theta=100.0))
    )
    np.testing.assert_allclose(turned[..., ::2] + 1j * turned[..., 1::2], expected, atol=1e-5)


def test_examples_may_have_positions_of_their_own():
    positions = jnp.arange(10.0).reshape(2, 5, 1)
    x = normal(0, 2, 5, 3, 4)
    turned = rotate(x, rotary(positions, (4,)))
    for i in range(2):
        np.testing.assert_allclose(turned[i], rotate(x[i : i + 1], rotary(positions[i], (4,)))[0], atol=1e-6)


def test_it_is_computed_in_float32():
    x, by = normal(0, 1, 3, 2, 4), rotary(1000.0 * jnp.ones((3, 1)), (4,))
    low = rotate(x.astype(jnp.bfloat16), by)
    assert low.dtype == jnp.bfloat16
    expected = rotate(x.astype(jnp.bfloat16).astype(jnp.float32), by)
    np.testing.assert_array_equal(low, expected.astype(jnp.bfloat16))


def test_attention_knows_distances_alone():
    x, positions = normal(0, 1, 6, 8), jnp.arange(6.0)[:, None]
    module = Attention(2)
    variables = module.init(jax.random.key(0), x)
    apply = jax.jit(lambda positions: module.apply(variables, x, rotary=rotary(positions, (4,))))
    here = apply(positions)
    np.testing.assert_allclose(apply(positions + 11.0), here, atol=1e-5)
    assert float(jnp.abs(apply(2.0 * positions) - here).max()) > 1e-3
