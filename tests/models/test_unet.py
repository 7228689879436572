import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.unet import SIZES, UNet
from diffjax.nn.conditioning import Cond, drop_cond

TINY = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": (1, 1),
    "self_attention": (False, True),
    "cross_attention": (False, True),
    "head_dim": 8,
}
BASE = UNet(**TINY)
EFFICIENT = UNet(**TINY, efficient=True)
ONE_LEVEL = UNet(
    **TINY | {"multipliers": (1,), "blocks": (1,), "self_attention": (True,), "cross_attention": (True,)},
    efficient=True,
)
SIZE = 8


def batch(size=SIZE, seed=0, super_resolution=True):
    """Three examples: full text, part of a text, no text."""
    keys = jax.random.split(jax.random.key(seed), 6)
    cond = Cond(
        text=jax.random.normal(keys[0], (3, 4, 5)),
        mask=jnp.array([[True] * 4, [True, True, False, False], [False] * 4]),
        pooled=jax.random.normal(keys[1], (3, 5)),
    )
    if super_resolution:
        cond = cond._replace(
            low_res=jax.random.normal(keys[2], (3, size, size, 3)), aug_level=jnp.array([2.0, 0.0, -3.0])
        )
    return jax.random.normal(keys[3], (3, size, size, 3)), jnp.array([3.0, -1.0, 0.5]), cond


def randomised(net, inputs):
    """Parameters without a zero in them: zero-initialised layers would hide every mistake before them."""
    shapes = nn.meta.unbox(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if len(leaf.shape) == 1:
            noise = random.normal(float(path[-1].key == "scale"), 0.2, leaf.shape)
        else:  # of a fresh kernel's size, so that the activations stay moderate
            noise = random.normal(0.0, max(leaf.size // leaf.shape[-1], 4) ** -0.5, leaf.shape)
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Case(NamedTuple):
    net: UNet
    params: dict
    inputs: tuple
    apply: object


@functools.cache
def case(net):
    inputs = batch()
    params = randomised(net, inputs)
    return Case(net, params, inputs, jax.jit(lambda params, *args: net.apply({"params": params}, *args)))


@pytest.fixture(params=[BASE, EFFICIENT], ids=["base", "efficient"])
def tiny(request):
    return case(request.param)


def test_the_output_has_the_shape_of_the_images_and_is_float32(tiny):
    out = tiny.apply(tiny.params, *tiny.inputs)
    chex.assert_shape(out, (3, SIZE, SIZE, 3))
    assert out.dtype == jnp.float32
    assert 0.05 < float(out.std()) < 50.0  # the comparisons below mean something


def test_a_new_network_predicts_zero(tiny):
    last = jax.jit(lambda key: nn.meta.unbox(tiny.net.init(key, *tiny.inputs)["params"]["out"]))
    new = tiny.params | {"out": last(jax.random.key(0))}
    chex.assert_trees_all_equal(tiny.apply(new, *tiny.inputs), jnp.zeros((3, SIZE, SIZE, 3)))


def test_the_output_depends_on_every_input_and_on_no_other_example(tiny):
    x, logsnr, cond = tiny.inputs
    before = tiny.apply(tiny.params, x, logsnr, cond)

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
        change = np.abs(tiny.apply(tiny.params, *inputs) - before).max(axis=(1, 2, 3))
        assert change[1] > 1e-3, name
        assert change[0] == change[2] == 0.0, name


def test_a_masked_token_does_not_matter(tiny):
    x, logsnr, cond = tiny.inputs
    other = cond._replace(text=cond.text.at[1, 2:].set(7.0))
    chex.assert_trees_all_equal(
        tiny.apply(tiny.params, x, logsnr, cond), tiny.apply(tiny.params, x, logsnr, other)
    )


def test_dropped_text_ignores_text_and_pooled(tiny):
    x, logsnr, cond = tiny.inputs
    dropped = drop_cond(cond, jnp.array([True, False, False]))
    other = dropped._replace(text=dropped.text.at[0].set(7.0), pooled=dropped.pooled.at[0].set(7.0))
    out = tiny.apply(tiny.params, x, logsnr, dropped)
    chex.assert_trees_all_equal(out, tiny.apply(tiny.params, x, logsnr, other))
    assert float(jnp.abs(out - tiny.apply(tiny.params, x, logsnr, cond))[0].max()) > 1e-3


def test_gradients_reach_every_parameter_and_no_other_example(tiny):
    x, logsnr, cond = tiny.inputs
    given = {k: v for k, v in cond._asdict().items() if k != "mask" and v is not None}
    floats = {"x": x, "logsnr": logsnr, **given}

    def outputs(params, floats):
        cond = Cond(mask=tiny.inputs[2].mask, **{k: v for k, v in floats.items() if k not in ("x", "logsnr")})
        return tiny.net.apply({"params": params}, floats["x"], floats["logsnr"], cond)

    @jax.jit
    def gradients(cotangent):
        return jax.vjp(outputs, tiny.params, floats)[1](cotangent)

    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    of_params, _ = gradients(weights)
    for path, gradient in jax.tree_util.tree_leaves_with_path(of_params):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):
            continue  # one constant added to all logits of a query does not change its softmax
        assert float(jnp.abs(gradient).max()) > 1e-5, name

    _, of_inputs = gradients(weights * jnp.array([1.0, 0.0, 0.0])[:, None, None, None])
    for name, gradient in of_inputs.items():
        assert float(jnp.abs(gradient[0]).max()) > 0.0, name
        chex.assert_trees_all_equal(gradient[1:], jnp.zeros_like(gradient[1:]))


def test_unrolled_loops_change_nothing():
    net, inputs = ONE_LEVEL.clone(blocks=(3,), efficient=False), batch()
    params = randomised(net, inputs)
    rolled, unrolled = (
        jax.jit(other.apply)({"params": params}, *inputs) for other in (net, net.clone(scan=False))
    )
    chex.assert_trees_all_close(unrolled, rolled, rtol=1e-5, atol=1e-5)


def test_remat_changes_nothing_but_memory():
    plain, inputs = ONE_LEVEL.clone(blocks=(2,)), batch()
    params = randomised(plain, inputs)
    results = []
    for net in (plain, plain.clone(remat="full")):
        loss = jax.value_and_grad(lambda p, net=net: jnp.mean(net.apply({"params": p}, *inputs) ** 2))
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == bool(net.remat)
        results.append(jax.jit(loss)(params))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32(tiny):
    out = tiny.apply(tiny.params, *tiny.inputs)
    low = jax.jit(tiny.net.clone(dtype=jnp.bfloat16).apply)({"params": tiny.params}, *tiny.inputs)
    assert low.dtype == jnp.float32
    assert 0.0 < float(jnp.linalg.norm(low - out) / jnp.linalg.norm(out)) < 0.05


def test_dropout_acts_in_training_only():
    net, inputs = ONE_LEVEL.clone(dropout=0.5), batch()
    params = randomised(net, inputs)
    still = jax.make_jaxpr(net.apply)({"params": params}, *inputs)  # needs no rng
    assert str(still) == str(jax.make_jaxpr(ONE_LEVEL.apply)({"params": params}, *inputs))
    train = jax.jit(
        lambda key: net.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key})
    )
    assert float(jnp.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max()) > 1e-3
    jax.eval_shape(
        lambda: ONE_LEVEL.apply({"params": params}, *inputs, deterministic=False)
    )  # a rate of zero needs no rng either


def convolutions(jaxpr):
    """The shapes (kernel, output) of all convolutions of a jaxpr and the jaxprs inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append((equation.invars[1].aval.shape, equation.outvars[0].aval.shape))
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found.extend(convolutions(inner))
    return found


def test_the_efficient_network_computes_almost_nothing_at_full_resolution():
    inputs = batch(16)
    flops, at_full_resolution = [], []
    for net in (BASE, EFFICIENT):
        variables = jax.eval_shape(net.init, jax.random.key(0), *inputs)
        found = convolutions(jax.make_jaxpr(net.apply)(nn.meta.unbox(variables), *inputs).jaxpr)
        at_full_resolution.append([kernel for kernel, out in found if out[1] == 16])
        flops.append(jax.jit(net.apply).lower(nn.meta.unbox(variables), *inputs).cost_analysis()["flops"])
    assert at_full_resolution[1] == [(3, 3, 6, 8), (3, 3, 8, 3)]  # pixels in, prediction out
    assert len(at_full_resolution[0]) > 6
    assert flops[1] < flops[0] / 3


def test_every_parameter_has_logical_axis_names(tiny):
    params = jax.eval_shape(tiny.net.init, jax.random.key(0), *tiny.inputs)["params"]
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for path, box in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        assert is_box(box), jax.tree_util.keystr(path)
        assert len(box.names) == box.value.ndim, jax.tree_util.keystr(path)
        assert all(isinstance(name, str) for name in box.names)
    spec = nn.get_partition_spec(params)["in"]["kernel"]
    assert tuple(spec) == ("window", "window", "conv_in", "conv_out")


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("base64-2b", 64, 2100),
        ("base64-500m", 64, 524),
        ("sr256-400m", 256, 429),
        ("sr256-600m", 256, 600),
        ("sr1024-600m", 1024, 600),
    ],
)
def test_published_configurations_build_at_about_their_size(name, size, millions):
    net = UNet(**SIZES[name], dtype=jnp.bfloat16)
    abstract = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    images, level = abstract((2, size, size, 3)), abstract((2,))
    cond = Cond(abstract((2, 128, 1024)), jax.ShapeDtypeStruct((2, 128), bool), abstract((2, 1024)))
    if "sr" in name:
        cond = cond._replace(low_res=images, aug_level=level)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images, level, cond)
    assert out.shape == images.shape
    count = sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6
    print(f"{name}: {count:.3f} M parameters")
    assert 0.95 * millions < count < 1.05 * millions


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"blocks": (1, 1, 1)}, r"blocks has 3 entries, \(1, 1, 1\).* 2 multipliers \(1, 2\)"),
        ({"self_attention": (True,)}, "self_attention has 1 entries"),
        ({"cross_attention": ()}, "cross_attention has 0 entries"),
        ({"strides": (1, 2, 2)}, "strides has 3 entries"),
        ({"blocks": (1, 0)}, r"needs a block and a stride; got \(1, 0\)"),
        ({"head_dim": 5}, "level 1 attends in a feature map 16 wide, which the 3 heads that head_dim=5"),
        ({"strides": (1, 3)}, "images of 8x8 pixels; this network divides the resolution by 3"),
    ],
)
def test_contradicting_attributes_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(UNet(**TINY | attributes).init, jax.random.key(0), *batch())


def test_low_resolution_images_must_have_been_upsampled():
    x, logsnr, cond = batch()
    with pytest.raises(ValueError, match=r"low_res has shape \(3, 4, 4, 3\); expected it upsampled"):
        jax.eval_shape(
            BASE.init, jax.random.key(0), x, logsnr, cond._replace(low_res=jnp.zeros((3, 4, 4, 3)))
        )


def test_levels_are_told_to_the_network_in_the_number_it_says():
    params, (x, logsnr, cond) = case(ONE_LEVEL)[1:3]
    edm = ONE_LEVEL.clone(time_input="edm")
    out = jax.jit(edm.apply)(
        {"params": params}, x, logsnr / -8.0, cond._replace(aug_level=cond.aug_level / -8.0)
    )
    chex.assert_trees_all_close(out, case(ONE_LEVEL).apply(params, x, logsnr, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("strides", [(1, 2, 2), (2, 2, 1), (4, 1, 1)])
def test_any_strides_and_no_super_resolution(efficient, strides):
    three = {"multipliers": (1, 3, 2), "blocks": (2, 1, 2), "self_attention": (False,) * 3}
    net = UNet(
        **TINY | three | {"cross_attention": (False, True, True)}, efficient=efficient, strides=strides
    )
    inputs = batch(super_resolution=False)
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs)
    assert out.shape == inputs[0].shape
