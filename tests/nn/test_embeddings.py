from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.embeddings import (
    LabelEmbedding,
    NoiseLevelEmbedding,
    sincos_positions_2d,
    sinusoidal,
    to_thousand,
)
from diffjax.nn.placement import unbox

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


def test_every_way_to_tell_a_level_ends_on_the_scale_of_a_thousand():
    sigma = np.array([0.01, 0.5, 1.0, 80.0])
    logsnr = -2.0 * np.log(sigma)  # of EDM's process, whose alpha is 1
    expected = (logsnr + 20.0) / 40.0 * 1000.0
    np.testing.assert_allclose(to_thousand(jnp.asarray(logsnr), "logsnr"), expected, rtol=1e-5)
    np.testing.assert_allclose(to_thousand(jnp.asarray(np.log(sigma) / 4.0), "edm"), expected, rtol=1e-5)
    for name in ("timestep", "time"):
        np.testing.assert_array_equal(to_thousand(jnp.asarray([0.0, 999.0]), name), [0.0, 999.0])
    with pytest.raises(ValueError, match="time_input is 'sigma'; expected logsnr, edm, timestep or time"):
        to_thousand(jnp.zeros(1), "sigma")


@pytest.mark.parametrize("null", [True, False])
def test_no_class_is_the_last_row_or_zeros(null):
    module = LabelEmbedding(5, 3, null=null)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5 + null, 3)), jnp.float32)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, jnp.int32))["params"])
    assert shapes["table"]["embedding"].shape == table.shape
    found = module.apply({"params": {"table": {"embedding": table}}}, jnp.array([0, 4, -1, -7]))
    no_class = table[5] if null else jnp.zeros(3)
    np.testing.assert_array_equal(found, jnp.stack([table[0], table[4], no_class, no_class]))
