import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import num_params, randomised, relative_error

from diffjax.interop.sd3 import example
from diffjax.models.mmdit import SIZES, MMDiT, Stack, stacks
from diffjax.nn.conditioning import Cond
from diffjax.nn.layers import axis_rules, logical_axes, unbox
from diffjax.parallel.rules import Rules

TINY = MMDiT(
    depth=4,
    heads=2,
    head_dim=8,
    in_channels=3,
    out_channels=3,
    text_embed=6,
    pooled_embed=5,
    max_size=6,
    base_size=8,
    qk_norm="rms",
    dual_attention=(0, 1),
)


def batch(seed=0):
    """Two examples."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    cond = Cond(text=draw(2, 3, 6), pooled=draw(2, 5))
    return draw(2, 4, 6, 3), np.float32([250.0, 800.0]), cond


INPUTS = batch()
PARAMS = randomised(TINY, *INPUTS)


@functools.cache
def jitted(module):
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))


def forward(module, inputs=INPUTS):
    return jitted(module)(PARAMS, *inputs)


@functools.cache
def gradients(module):
    """Of half the sum of all squares of the prediction."""
    return jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, *INPUTS) ** 2) / 2))(PARAMS)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_unrolled_blocks_are_the_same_network():
    assert relative_error(forward(TINY.clone(scan=False)), forward(TINY)) < 1e-6


def test_recomputed_activations_give_the_same_gradients():
    remat = TINY.clone(remat="full")
    assert "remat" in str(jax.make_jaxpr(remat.apply)({"params": PARAMS}, *INPUTS))
    expected = by_path(gradients(TINY))
    for path, gradient in by_path(gradients(remat)).items():
        np.testing.assert_allclose(
            gradient, expected[path], atol=1e-5 * np.abs(expected[path]).max(), rtol=0, err_msg=path
        )


def test_bfloat16_is_close_to_float32():
    y, low = forward(TINY), forward(TINY.clone(dtype=jnp.bfloat16))
    assert low.dtype == y.dtype == jnp.float32
    assert y.shape == (2, 4, 6, 3)
    assert 0.0 < float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y)) < 0.05


def test_gradients_reach_every_parameter_that_counts():
    unused = {path for path, leaf in by_path(gradients(TINY)).items() if np.abs(leaf).max() < 1e-5}
    # No text is asked for after the last block, and the table of positions is never learned.
    last = "blocks_3/attention/context_query"
    assert unused == {"positions", f"{last}/kernel", f"{last}/bias", f"{last}_norm/scale"}


def test_the_prediction_depends_on_every_input_and_on_no_other_example():
    x, level, cond = INPUTS
    before = forward(TINY)
    for name, inputs in {
        "x": (x + bump(x), level, cond),
        "level": (x, level + bump(level), cond),
        "text": (x, level, cond._replace(text=cond.text + bump(cond.text))),
        "pooled": (x, level, cond._replace(pooled=cond.pooled + bump(cond.pooled))),
    }.items():
        change = np.abs(forward(TINY, inputs) - before).max(axis=(1, 2, 3))
        assert change[1] > 1e-3, name
        assert change[0] == 0.0, name


def bump(array):
    """One in the second example."""
    return np.eye(2, dtype=np.float32)[1].reshape(2, *(1,) * (array.ndim - 1))


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    def fresh(key):
        new = TINY.init(key, *INPUTS)["params"]
        return unbox({"out": new["out"], "modulation": new["blocks_0"]["modulation"]})

    new = jax.jit(fresh)(jax.random.key(0))
    assert not np.any(jitted(TINY)(PARAMS | {"out": new["out"]}, *INPUTS))
    assert not np.any(new["modulation"]["dense"]["kernel"])


def test_all_axes_have_rules():
    boxed = jax.eval_shape(TINY.init, jax.random.key(0), *INPUTS)["params"]
    for names in jax.tree.leaves(logical_axes(boxed), is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert None not in names
        Rules().spec(names)
    with axis_rules(Rules().pairs()):
        jax.eval_shape(TINY.apply, {"params": PARAMS}, *INPUTS)


def test_images_and_texts_of_other_widths_are_refused():
    x, level, cond = INPUTS
    for wrong, complaint in (
        ((x[..., :2], level, cond), "2 channels"),
        ((x, level, cond._replace(text=cond.pooled[:, None])), "wide; expected"),
        ((x, level, cond._replace(pooled=None)), "conditioned on text"),
        ((np.zeros((2, 4, 14, 3)), level, cond), "positions for 6 x 6"),
    ):
        with pytest.raises(ValueError, match=complaint):
            jax.eval_shape(TINY.apply, {"params": PARAMS}, *wrong)


def test_alike_blocks_are_one_stack_and_the_last_is_alone():
    assert stacks(24, ()) == [Stack(0, 23, False, False), Stack(23, 1, False, True)]
    assert stacks(4, (1, 3)) == [
        Stack(0, 1, False, False),
        Stack(1, 1, True, False),
        Stack(2, 1, False, False),
        Stack(3, 1, True, True),
    ]
    assert stacks(1, ()) == [Stack(0, 1, False, True)]
    names = {stack.name for stack in stacks(TINY.depth, TINY.dual_attention)}
    assert names == {"blocks_0", "blocks_2", "blocks_3"} <= PARAMS.keys()


@pytest.mark.parametrize(
    ("name", "count"),  # of diffusers' parameters; the table of positions is a buffer there
    [("sd3_medium", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("sd35_large", 8_056_627_520)],
)
def test_published_sizes_have_the_published_numbers_of_parameters(name, count):
    module = MMDiT(**SIZES[name])
    positions = module.max_size**2 * module.heads * module.head_dim
    assert num_params(module, *example(module)) == count + positions
