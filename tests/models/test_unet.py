import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import compiled
from tiny_networks import LOGSNR, NETWORKS, SUPER, UNET, told

from diffjax.models.unet import UNet
from diffjax.nn.placement import unbox

TINY = UNET | {"blocks": (1, 1)}
INPUTS = told(LOGSNR, *SUPER)
BASE = UNet(**TINY)
EFFICIENT = UNet(**TINY, efficient=True)


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
    _, logsnr, cond = INPUTS
    images = jnp.zeros((3, 16, 16, 3))
    inputs = images, logsnr, cond._replace(low_res=images)
    flops, at_full_resolution = [], []
    for net in (BASE, EFFICIENT):
        variables = jax.eval_shape(net.init, jax.random.key(0), *inputs)
        found = convolutions(jax.make_jaxpr(net.apply)(unbox(variables), *inputs).jaxpr)
        at_full_resolution.append([kernel for kernel, out in found if out[1] == 16])
        flops.append(jax.jit(net.apply).lower(unbox(variables), *inputs).cost_analysis()["flops"])
    assert at_full_resolution[1] == [(3, 3, 6, 8), (3, 3, 8, 3)]  # pixels in, prediction out
    assert len(at_full_resolution[0]) > 6
    assert flops[1] < flops[0] / 3


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"blocks": (1, 1, 1)}, r"blocks has 3 entries, \(1, 1, 1\).* 2 multipliers \(1, 2\)"),
        ({"self_attention": (True,)}, "self_attention has 1 entries"),
        ({"cross_attention": ()}, "cross_attention has 0 entries"),
        ({"strides": (1, 2, 2)}, "strides has 3 entries"),
        ({"blocks": (1, 0)}, r"needs a block and a stride; got \(1, 0\)"),
        ({"head_dim": 5}, "level 1 attends in a feature map 16 wide, which the 3 heads that head_dim=5"),
        ({"strides": (1, 3)}, "images of 8x4 pixels; this network divides the resolution by 3"),
    ],
)
def test_contradicting_attributes_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(UNet(**TINY | attributes).init, jax.random.key(0), *INPUTS)


def test_low_resolution_images_must_have_been_upsampled():
    x, logsnr, cond = INPUTS
    with pytest.raises(ValueError, match=r"low_res has shape \(3, 4, 4, 3\); expected it upsampled"):
        jax.eval_shape(
            BASE.init, jax.random.key(0), x, logsnr, cond._replace(low_res=jnp.zeros((3, 4, 4, 3)))
        )


def test_levels_are_told_to_the_network_in_the_number_it_says():
    tiny, (x, logsnr, cond) = NETWORKS["unet efficient"], INPUTS
    edm = compiled(tiny.net.clone(time_input="edm"))
    out = edm(tiny.params, x, logsnr / -8.0, cond._replace(aug_level=cond.aug_level / -8.0))
    np.testing.assert_allclose(out, tiny(), rtol=1e-4, atol=1e-5)


def test_kernels_of_convolutions_name_their_axes():
    assert NETWORKS["unet"].boxed["in"]["kernel"].names == ("window", "window", "conv_in", "conv_out")


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("strides", [(1, 2, 2), (2, 2, 1), (4, 1, 1)])
def test_any_strides_and_no_super_resolution(efficient, strides):
    three = {"multipliers": (1, 3, 2), "blocks": (2, 1, 2), "self_attention": (False,) * 3}
    net = UNet(
        **TINY | three | {"cross_attention": (False, True, True)}, efficient=efficient, strides=strides
    )
    inputs = told(LOGSNR, "text", "mask", "pooled")
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs)
    assert out.shape == inputs[0].shape
