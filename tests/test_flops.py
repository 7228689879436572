import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from diffjax.config import stage_config
from diffjax.experiment import MODELS, SIZES
from diffjax.flops import Flops, model_flops, stage_flops
from diffjax.models.dit import DiT
from diffjax.models.unet import UNet
from diffjax.nn.attention import Attention
from diffjax.nn.conditioning import Cond
from diffjax.nn.kernels import use_kernel
from diffjax.nn.layers import conv
from diffjax.nn.placement import unbox


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("kernel", ["xla", "flash"])
def test_attention_is_four_projections_and_two_products(kernel):
    b, n, m, e, c = 2, 10, 7, 16, 12
    with use_kernel(kernel):  # whatever computes it
        found = model_flops(Attention(4), array(b, n, e), array(b, m, c))
    assert found == Flops(matmul=2 * b * (2 * n * e * e + 2 * m * c * e + 2 * n * m * e))


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_convolutions(stride, groups):
    x, kernel = array(3, 8, 8, 8), array(3, 3, 8 // groups, 12)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    forward = 2 * 3 * (8 // stride) ** 2 * 9 * (8 // groups) * 12
    found = model_flops(convolve, x, kernel)
    assert found == Flops(conv=forward)
    assert found.multiply_adds == forward // 2
    # Each of the gradients takes as much once more, since what is inserted between pixels is no work.
    both = jax.grad(lambda x, kernel: convolve(x, kernel).sum(), (0, 1))
    assert model_flops(both, x, kernel).conv == 3 * forward
    assert model_flops(conv(5), array(1, 4, 4, 2)) == Flops(conv=2 * 16 * 9 * 2 * 5)


W = array(4, 4)
PRODUCT = 2 * 4 * 4 * 4


def test_programs_within_programs():
    def repeated(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, x), None), x, length=5)[0]

    def nested(x):
        return jax.lax.scan(lambda x, _: (jax.jit(repeated)(x), None), x, length=3)[0]

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    @jax.custom_vjp
    def custom(x):
        return x @ x

    custom.defvjp(lambda x: (x @ x, x), lambda x, y: (x @ y + y @ x,))
    assert model_flops(repeated, W).matmul == 5 * PRODUCT
    assert model_flops(nested, W).matmul == 15 * PRODUCT
    assert model_flops(branches, W).matmul == 2 * PRODUCT
    assert model_flops(custom, W).matmul == PRODUCT
    assert model_flops(jax.grad(lambda x: custom(x).sum()), W).matmul == 3 * PRODUCT
    assert model_flops(lambda x: jnp.exp(x) + x, W) == Flops()


def test_a_loop_of_unknown_length_is_refused_if_it_matters():
    def loop(x, step):
        return jax.lax.while_loop(lambda x: x.sum() < 3.0, step, x)

    assert model_flops(lambda x: loop(x, jnp.exp), W) == Flops()
    with pytest.raises(ValueError, match="while loop multiplies matrices"):
        model_flops(lambda x: loop(x, lambda x: x @ x), W)


def test_what_each_device_does_counts_for_all():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")
    product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, None), out_specs=rows, axis_names={"data"})
    assert model_flops(jax.jit(product), array(8, 4), W).matmul == 2 * 8 * 4 * 4


def test_pallas_kernels_count_once_for_each_step_of_their_grid():
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    x = array(2, 3, 256, 16)
    assert model_flops(flash_attention, x, x, x).matmul == 2 * (2 * 2 * 3 * 256 * 256 * 16)


def inputs(size, channels, batch=1):
    cond = Cond(array(batch, 8, 16), array(batch, 8, dtype=bool), array(batch, 16))
    return array(batch, size, size, channels), array(batch), cond


def compiled_flops(net, examples):
    params = jax.eval_shape(net.init, jax.random.key(0), *examples)
    return (
        jax.jit(lambda *args: nn.meta.unbox(net.apply(*args)))
        .lower(params, *examples)
        .cost_analysis()["flops"]
    )


def test_a_transformer_agrees_with_the_compiler():
    net = DiT(patch=2, embed=256, depth=2, heads=4, scan=False)
    examples = inputs(32, 3, batch=2)
    found = model_flops(net, *examples)
    # The compiler counts activations, norms and the softmax too; they are a few percent at this width.
    assert 1.0 < compiled_flops(net, examples) / found.total < 1.06
    assert found.conv == 0
    assert (
        found
        == model_flops(net.clone(scan=True), *examples)
        == model_flops(net.clone(remat="full"), *examples)
    )


def test_a_unet_agrees_with_the_compiler():
    levels = {"self_attention": (False, True), "cross_attention": (False, True), "head_dim": 32}
    net = UNet(channels=64, multipliers=(1, 2), blocks=(1, 1), **levels)
    examples = inputs(32, 3)
    found = model_flops(net, *examples)
    # Here it also leaves out the taps that fall on the padding, 4 % of those of a 3x3 kernel at 32 pixels.
    assert 0.92 < compiled_flops(net, examples) / found.total < 1.04
    assert found.conv > 4 * found.matmul > 0


def test_dit_xl_2_takes_what_was_published():
    net = DiT(2, 1152, 28, 16, classes=1000, text="", out_channels=8, time_input="timestep")
    found = model_flops(net, array(1, 32, 32, 4), array(1), Cond(label=array(1, dtype=jnp.int32)))
    assert abs(found.multiply_adds / 118.6e9 - 1.0) < 1e-3  # Peebles and Xie, 2023, table 4: 118.6 Gflops


def test_a_stage_takes_what_its_network_takes():
    config = stage_config()
    config.model = {"name": "dit", "patch": 4, "embed": 32, "depth": 2, "heads": 2}
    config.resolution, config.text.length = 16, 8
    net = DiT(patch=4, embed=32, depth=2, heads=2)
    assert stage_flops(config, text_embed=16) == model_flops(net, *inputs(16, 3)) != Flops()


# Height and width, channels and text tokens of one input of a size, or of the sizes whose names begin so.
USUAL = {
    "DiT": (32, 4, 0),
    "JiT-B/16": (256, 3, 0),
    "JiT-L/16": (256, 3, 0),
    "JiT-H/16": (256, 3, 0),
    "JiT": (512, 3, 0),
    "PixArt-alpha-XL/2-256": (32, 4, 120),
    "PixArt-alpha-XL/2-512": (64, 4, 120),
    "PixArt-alpha-XL/2-1024": (128, 4, 120),
    "base64": (64, 3, 128),
    "sr256": (256, 3, 128),
    "sr1024": (1024, 3, 128),
    "SD-1.5": (64, 4, 77),
    "SD-2.1": (96, 4, 77),
    "SDXL": (128, 4, 77),
    "IF-II-": (256, 3, 77),
    "IF-I-": (64, 3, 77),
    "ADM-64": (64, 3, 0),
    "ADM-128": (128, 3, 0),
    "ADM-256": (256, 3, 0),
    "ADM-512": (512, 3, 0),
    "DDPM": (32, 3, 0),
    "sd3": (128, 16, 77 + 256),
    "2b": (128, 16, 77 + 256),
    "flux1": (128, 16, 512),
}


def usual(name, size):
    """A network of a published size, and one input."""
    net = MODELS[name](**SIZES[name][size])
    side, channels, tokens = next((USUAL[key] for key in USUAL if size.startswith(key)), (64, 4, 0))
    width = getattr(net, "text_embed", 4096)  # which Imagen's take as it comes
    pooled = getattr(net, "pooled_embed", width) - 6 * getattr(net, "size_embed", 0)
    x, level = array(1, side, side, channels), array(1)
    super_resolution = size.startswith(("sr", "IF-II-"))
    cond = Cond(
        text=array(1, tokens, width),
        mask=array(1, tokens, dtype=bool),
        pooled=array(1, pooled),
        low_res=x if super_resolution else None,
        aug_level=level if super_resolution else None,
        label=array(1, dtype=jnp.int32),
        size=array(1, 6),
        guidance=level,
    )
    return net, (x, level, cond)


def said_of(net, examples, *, flops=True):
    """Parameters and multiply-adds in the words of docs/models.md."""
    shapes = unbox(jax.eval_shape(net.init, jax.random.key(0), *examples)["params"])
    shapes.pop("positions", None)  # the fixed table of an MMDiT
    millions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    count = f"{millions:.1f} M" if millions < 1000 else f"{millions / 1000:.2f} B"
    if not flops:
        return (count,)
    giga = model_flops(net, *examples).multiply_adds / 1e9
    return count, f"{giga:.1f}" if giga < 1000 else f"{giga:.0f}"


TABLE = {
    (name, size): (parameters, flops)
    for name, size, _, parameters, flops in re.findall(
        r"^\| `(\w+)` \| `([^`]+)` \| ([^|]+) \| ([\d.]+ [MB]) \| ([\d.]+) \|$",
        (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}


def test_the_documentation_has_a_row_for_every_published_size():
    assert TABLE.keys() == {(name, size) for name, sizes in SIZES.items() for size in sizes}


# Those that are traced within a second or two.
@pytest.mark.parametrize(("name", "size"), [("dit", "DiT-L/4"), ("unet2d", "DDPM-CIFAR10")])
def test_the_documentation_says_what_a_network_takes(name, size):
    assert said_of(*usual(name, size)) == TABLE[name, size]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dit", "DiT-XL/2"),
        ("dit", "JiT-H/32"),
        ("dit", "PixArt-alpha-XL/2-1024"),
        ("unet", "sr1024-600m"),
        ("mmdit", "sd35_large"),
        ("flux", "flux1_schnell"),
    ],
)
def test_the_documentation_says_how_large_a_network_is(name, size):
    assert said_of(*usual(name, size), flops=False) == TABLE[name, size][:1]
