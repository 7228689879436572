import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.dit import DiT
from diffjax.nn.conditioning import Cond, drop_cond
from diffjax.nn.layers import logical_axes, unbox
from diffjax.nn.patches import patchify, unpatchify
from diffjax.parallel.rules import Rules

NET = DiT(patch=2, embed=16, depth=2, heads=2)
SIZE = 8


def batch(size=SIZE, low_res=True):
    """Three examples: full text, part of a text, no text."""
    keys = jax.random.split(jax.random.key(0), 4)
    cond = Cond(
        text=jax.random.normal(keys[0], (3, 4, 5)),
        mask=jnp.array([[True] * 4, [True, True, False, False], [False] * 4]),
        pooled=jax.random.normal(keys[1], (3, 5)),
    )
    if low_res:
        images = jax.random.normal(keys[2], (3, size, size, 3))
        cond = cond._replace(low_res=images, aug_level=jnp.array([2.0, 0.0, -3.0]))
    return jax.random.normal(keys[3], (3, size, size, 3)), jnp.array([3.0, -1.0, 0.5]), cond


def randomised(net, inputs):
    """Parameters without a zero in them: zero-initialised gates would hide every mistake behind them."""
    shapes = unbox(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 0.2 if leaf.ndim == 1 else leaf.shape[0] ** -0.5
        return jnp.asarray(random.normal(float(path[-1].key == "scale"), scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


INPUTS = batch()
PARAMS = randomised(NET, INPUTS)
apply = jax.jit(lambda params, *inputs: NET.apply({"params": params}, *inputs))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_is_the_inverse_of_patchify(patch):
    images = jnp.arange(2 * 4 * 8 * 3, dtype=jnp.float32).reshape(2, 4, 8, 3)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, 32 // patch**2, patch * patch * 3)
    np.testing.assert_array_equal(unpatchify(tokens, patch, 4, 8), images)
    np.testing.assert_array_equal(tokens[1, 1], images[1, :patch, patch : 2 * patch].ravel())  # by row


def test_the_output_is_float32_of_the_images_shape():
    out = apply(PARAMS, *INPUTS)
    assert out.shape == (3, SIZE, SIZE, 3)
    assert out.dtype == jnp.float32
    assert 0.05 < float(out.std()) < 50.0  # the comparisons below mean something


def test_a_new_network_predicts_zero():
    last = jax.jit(lambda key: unbox(NET.init(key, *INPUTS)["params"]["patch_out"]))
    new = PARAMS | {"patch_out": last(jax.random.key(0))}
    np.testing.assert_array_equal(apply(new, *INPUTS), jnp.zeros((3, SIZE, SIZE, 3)))


def test_the_output_depends_on_every_input_and_on_no_other_example():
    x, logsnr, cond = INPUTS
    before = apply(PARAMS, x, logsnr, cond)

    def moved(array):
        return array.at[1].add(1.0)

    # A shift of all of a text's features would vanish in a norm, so move one feature.
    variants = {
        "x": (moved(x), logsnr, cond),
        "logsnr": (x, moved(logsnr), cond),
        "text": (x, logsnr, cond._replace(text=cond.text.at[1, 1, 0].add(1.0))),
        "mask": (x, logsnr, cond._replace(mask=cond.mask.at[1, 2].set(True))),
        "pooled": (x, logsnr, cond._replace(pooled=cond.pooled.at[1, 0].add(1.0))),
        "low_res": (x, logsnr, cond._replace(low_res=moved(cond.low_res))),
        "aug_level": (x, logsnr, cond._replace(aug_level=moved(cond.aug_level))),
    }
    for name, inputs in variants.items():
        change = np.abs(apply(PARAMS, *inputs) - before).max(axis=(1, 2, 3))
        assert change[1] > 1e-3, name
        assert change[0] == change[2] == 0.0, name


def test_every_pixel_sees_every_other_and_knows_its_place():
    x, logsnr, cond = INPUTS
    change = np.abs(apply(PARAMS, x.at[0, 0, 0, 0].add(3.0), logsnr, cond) - apply(PARAMS, *INPUTS))[0]
    assert change.max(axis=-1).min() > 1e-5
    constant = cond._replace(low_res=jnp.zeros_like(cond.low_res))
    flat = apply(PARAMS, jnp.zeros_like(x), logsnr, constant)
    assert float(jnp.abs(flat[:, :2, :2] - flat[:, 2:4, 4:6]).max()) > 1e-3


def test_a_masked_token_does_not_matter():
    x, logsnr, cond = INPUTS
    other = cond._replace(text=cond.text.at[1, 2:].set(7.0))
    np.testing.assert_array_equal(apply(PARAMS, x, logsnr, cond), apply(PARAMS, x, logsnr, other))


def test_dropped_text_ignores_text_and_pooled():
    x, logsnr, cond = INPUTS
    dropped = drop_cond(cond, jnp.array([True, False, False]))
    other = dropped._replace(text=dropped.text.at[0].set(7.0), pooled=dropped.pooled.at[0].set(7.0))
    out = apply(PARAMS, x, logsnr, dropped)
    np.testing.assert_array_equal(out, apply(PARAMS, x, logsnr, other))
    assert float(jnp.abs(out - apply(PARAMS, x, logsnr, cond))[0].max()) > 1e-3


def test_gradients_reach_every_parameter():
    weights = jnp.asarray(np.random.default_rng(1).normal(size=INPUTS[0].shape), jnp.float32)
    gradients = jax.jit(jax.grad(lambda params: (weights * apply(params, *INPUTS)).sum()))(PARAMS)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):
            continue  # one constant added to all logits of a query does not change its softmax
        # Every output of a layer counts: each shift, scale and gate is a slice of one kernel's.
        of_outputs = jnp.abs(gradient).reshape(-1, gradient.shape[-1]).max(axis=0)
        assert float(of_outputs.min()) > 1e-5, name


def test_remat_changes_nothing_but_memory():
    results = []
    one_block = NET.clone(depth=1)
    params = {name: leaf for name, leaf in PARAMS.items() if name != "block_1"}
    for net in (one_block, one_block.clone(remat=True)):
        loss = jax.value_and_grad(lambda p, net=net: jnp.mean(net.apply({"params": p}, *INPUTS) ** 2))
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == net.remat
        results.append(jax.jit(loss)(params))
    for plain, remat in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(plain, remat, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    out = apply(PARAMS, *INPUTS)
    low = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)({"params": PARAMS}, *INPUTS)
    assert low.dtype == jnp.float32
    assert 0.0 < float(jnp.linalg.norm(low - out) / jnp.linalg.norm(out)) < 0.05


def test_every_parameter_has_logical_axes_that_the_rules_know():
    boxed = jax.eval_shape(NET.init, jax.random.key(0), *INPUTS)["params"]
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    shapes = jax.tree_util.tree_leaves_with_path(unbox(boxed))
    names = jax.tree.leaves(logical_axes(boxed), is_leaf=is_names)
    for (path, shape), axes in zip(shapes, names, strict=True):
        assert len(axes) == shape.ndim, jax.tree_util.keystr(path)
        assert all(isinstance(axis, str) for axis in axes), jax.tree_util.keystr(path)
        Rules().spec(axes)  # raises at a name without a rule
    assert {leaf.dtype for _, leaf in shapes} == {jnp.dtype("float32")}


def test_without_cross_attention_text_enters_by_the_vector_alone():
    net, (x, logsnr, cond) = NET.clone(cross_attention=False), batch(low_res=False)
    params = randomised(net, (x, logsnr, cond))
    assert "cross_attention" not in params["block_0"]
    assert "aug_level" not in params
    run = jax.jit(lambda cond: net.apply({"params": params}, x, logsnr, cond))
    out = run(cond)
    np.testing.assert_array_equal(run(cond._replace(text=cond.text + 1.0)), out)
    assert float(jnp.abs(run(cond._replace(pooled=cond.pooled.at[0, 0].add(1.0))) - out)[0].max()) > 1e-3


def test_other_sizes_and_oblong_images_work():
    x, logsnr, cond = batch(low_res=False)
    out, _ = jax.eval_shape(NET.init_with_output, jax.random.key(0), x[:, :4], logsnr, cond)
    assert out.shape == (3, 4, 8, 3)


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="image of 8 x 8 is not divisible into patches of 3"):
        jax.eval_shape(NET.clone(patch=3).init, jax.random.key(0), *INPUTS)
    with pytest.raises(ValueError, match="width 16 is not divisible by 3 heads"):
        jax.eval_shape(NET.clone(heads=3).init, jax.random.key(0), *INPUTS)
