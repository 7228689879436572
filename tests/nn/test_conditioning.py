import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.conditioning import Cond, TextProjection, drop_cond, null_cond
from diffjax.nn.placement import logical_axes, unbox

MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def some_cond():
    return Cond(normal(0, 3, 3, 5), MASK, normal(1, 3, 5), normal(2, 3, 4, 4, 3), normal(3, 3))


@pytest.fixture(scope="module")
def projection():
    module = TextProjection(8)
    boxed = jax.eval_shape(module.init, jax.random.key(0), some_cond())["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0.1, 0.4, leaf.shape), jnp.float32), unbox(boxed)
    )
    return params, jax.jit(lambda cond: module.apply({"params": params}, cond)), boxed


def test_dropping_turns_whole_texts_off_and_nothing_else():
    cond = some_cond()
    dropped = drop_cond(cond, jnp.array([True, False, False]))
    np.testing.assert_array_equal(dropped.mask, [[False] * 3, MASK[1], MASK[2]])
    for name in ("text", "pooled", "low_res", "aug_level"):
        assert getattr(dropped, name) is getattr(cond, name)
    np.testing.assert_array_equal(drop_cond(cond, jnp.ones(3, bool)).mask, null_cond(cond).mask)


def test_the_null_condition_has_the_same_structure():
    cond, null = some_cond(), null_cond(some_cond())
    assert jax.tree.structure(cond) == jax.tree.structure(null)
    assert jax.tree.map(jnp.shape, cond) == jax.tree.map(jnp.shape, null)
    assert not null.mask.any()
    np.testing.assert_array_equal(null.low_res, cond.low_res)


def test_the_null_token_is_visible_exactly_where_there_is_no_text(projection):
    params, apply, _ = projection
    tokens, mask, vector = apply(some_cond())
    assert tokens.shape == (3, 4, 8)
    assert vector.shape == (3, 8)
    np.testing.assert_array_equal(mask[:, 0], [False, False, True])
    np.testing.assert_array_equal(mask[:, 1:], MASK)
    assert mask.any(axis=1).all()  # no row is empty
    np.testing.assert_array_equal(tokens[:, 0], np.tile(params["null_token"][0], (3, 1)))


def test_dropped_text_leaves_the_learned_vector(projection):
    params, apply, _ = projection
    _, _, vector = apply(some_cond())
    np.testing.assert_array_equal(vector[2], params["null_vector"][0])
    assert float(jnp.abs(vector[:2] - params["null_vector"]).max(axis=1).min()) > 1e-2
    _, _, null = apply(null_cond(some_cond()))
    np.testing.assert_array_equal(null, np.tile(params["null_vector"], (3, 1)))


def test_the_scale_of_the_encoder_does_not_matter(projection):
    _, apply, _ = projection
    cond = some_cond()
    _, _, vector = apply(cond)
    _, _, scaled = apply(cond._replace(pooled=30.0 * cond.pooled))
    np.testing.assert_allclose(scaled, vector, atol=1e-4)


def test_a_token_is_projected_by_itself(projection):
    _, apply, _ = projection
    cond = some_cond()
    tokens, _, vector = apply(cond)
    changed, _, same = apply(cond._replace(text=cond.text.at[0, 1, 0].add(1.0)))
    difference = np.abs(changed - tokens).max(axis=-1)
    assert difference[0, 2] > 1e-3
    difference[0, 2] = 0.0
    np.testing.assert_allclose(difference, 0.0, atol=1e-6)
    np.testing.assert_array_equal(vector, same)


def test_every_parameter_has_axis_names(projection):
    _, _, boxed = projection
    shapes = jax.tree.leaves(unbox(boxed))
    names = jax.tree.leaves(logical_axes(boxed), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert len(names) == len(shapes) > 5
    for axes, shape in zip(names, shapes, strict=True):
        assert len(axes) == len(shape.shape)
        assert all(isinstance(axis, str) for axis in axes)
