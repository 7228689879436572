from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.embeddings import NoiseLevelEmbedding, sincos_positions_2d, sinusoidal
from diffjax.nn.layers import unbox

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")


def test_sinusoids_agree_with_diffusers():
    ours = sinusoidal(jnp.asarray(GOLDEN["diffusers/embedding/values"]), 64)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, GOLDEN["diffusers/embedding/sinusoidal"], atol=1e-4)


def test_positions_agree_with_diffusers():
    # There the column comes first: DiT's meshgrid puts the width before the height.
    column, row = np.split(GOLDEN["diffusers/embedding/positions"], 2, axis=1)
    ours = sincos_positions_2d(3, 3, 16)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, np.concatenate([row, column], axis=1), atol=1e-6)


def test_positions_go_row_by_row_and_differ():
    ours = sincos_positions_2d(2, 3, 8)
    assert ours.shape == (6, 8)
    np.testing.assert_array_equal(ours[:3, :4], np.repeat(ours[:1, :4], 3, axis=0))  # the first row's
    np.testing.assert_array_equal(ours[:3, 4:], ours[3:, 4:])  # the same columns
    assert len(np.unique(ours, axis=0)) == 6


@pytest.fixture(scope="module")
def embedding():
    module = NoiseLevelEmbedding(12, sinusoids=32)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(2))["params"])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.4, leaf.shape), jnp.float32), shapes)
    return params, jax.jit(lambda level: module.apply({"params": params}, level))


def test_a_noise_level_goes_through_its_formula(embedding):
    params, apply = embedding
    level = np.array([-20.0, 0.0, 7.5, 20.0], np.float32)
    positions = (level.astype(np.float64) + 20.0) / 40.0 * 1000.0
    angles = positions[:, None] * 10_000.0 ** (-np.arange(16) / 16)
    h = (
        np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ params["mlp"]["in"]["kernel"]
        + params["mlp"]["in"]["bias"]
    )
    h = h / (1.0 + np.exp(-h))
    expected = h @ params["mlp"]["out"]["kernel"] + params["mlp"]["out"]["bias"]
    np.testing.assert_allclose(apply(jnp.asarray(level)), expected, atol=2e-3)


def test_every_noise_level_has_its_own_embedding(embedding):
    _, apply = embedding
    embedded = np.asarray(apply(jnp.linspace(-15.0, 15.0, 301)))
    distances = np.linalg.norm(embedded[:, None] - embedded[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 1e-2
