import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from diffjax.diffusion.losses import BatchLoss
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.models.mmdit import MMDiT
from diffjax.models.unet import UNet
from diffjax.models.unet2d import UNet2D
from diffjax.nn.conditioning import Cond
from diffjax.nn.placement import axis_rules, constrain, logical_axes, unbox
from diffjax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.training import ema
from diffjax.training.state import create_state, state_shardings
from diffjax.training.step import compile_train_step, make_train_step

LEVELS = {"blocks": (1, 1), "self_attention": (False, True), "cross_attention": (False, True), "head_dim": 4}
NETWORKS = {
    "dit": DiT(patch=4, embed=32, depth=2, heads=2),
    "unrolled_dit": DiT(patch=4, embed=32, depth=2, heads=2, scan=False),
    "unet": UNet(channels=8, multipliers=(1, 2), **LEVELS),
    "efficient_unet": UNet(channels=8, multipliers=(1, 2), efficient=True, **LEVELS),
    "mmdit": MMDiT(
        patch=4,
        depth=2,
        heads=2,
        head_dim=16,
        in_channels=3,
        out_channels=3,
        text_embed=6,
        pooled_embed=6,
        max_size=4,
        qk_norm="rms",
        dual_attention=(0,),
    ),
    "unet2d": UNet2D(
        in_channels=6,
        channels=(8, 16),
        blocks=(1, 1),
        attention=("self", "joint"),
        heads=(2, 2),
        resample=("conv", "conv"),
        middle_attention="transformer",
        modulation="scale_shift",
        text_embed=6,
        groups=4,
    ),
}
RATE = optax.constant_schedule(0.1)
# Not Adam: it divides by the size of the gradient, and so makes rounding errors of zero gradients large.
OPTIMIZER = optax.sgd(RATE, momentum=0.9)


def inputs(batch=16, size=16):
    random = np.random.default_rng(0)
    low_res, x, text = (
        random.normal(size=shape) for shape in ((batch, size, size, 3),) * 2 + ((batch, 4, 6),)
    )
    cond = Cond(text, np.ones((batch, 4), bool), text[:, 0], low_res, random.normal(size=batch))
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == float else leaf,
        (x, random.normal(size=batch), cond),
    )


def boxed(network):
    arguments = inputs(batch=1)
    return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]


def init(network, key):
    """Parameters of which none is zero: zero-initialised layers would hide what lies before them."""
    arguments = inputs(batch=1)
    params = unbox(jax.jit(network.init)(key, *arguments)["params"])
    return jax.tree.map(lambda leaf: leaf + 0.1 * np.cos(np.arange(leaf.size).reshape(leaf.shape)), params)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_placement_that_the_rules_know(name):
    params = boxed(NETWORKS[name])
    shapes, axes = unbox(params), logical_axes(params)
    # The three channels of the result do not divide; such a parameter is small.
    places = param_shardings(make_mesh(fsdp=2), Rules(), shapes, axes, min_size=400)
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    named = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for names, shape in zip(named, jax.tree.leaves(shapes), strict=True):
        assert len(names) == len(shape.shape)
        assert None not in names  # a parameter that nobody named would always be replicated
    large = [
        place
        for place, shape, names in zip(*map(jax.tree.leaves, (places, shapes)), named, strict=True)
        if shape.size >= 400 * (shape.shape[0] if "layers" in names else 1)
    ]
    assert len(large) > 10
    assert all("fsdp" in place.spec for place in large)
    # Stacked blocks are scanned: each must be on all devices when its turn comes.
    for place, names in zip(jax.tree.leaves(places), named, strict=True):
        assert "layers" not in names or place.spec in (PartitionSpec(), PartitionSpec(None, *place.spec[1:]))


def test_an_unknown_axis_is_an_error_and_not_replicated():
    with pytest.raises(ValueError, match="'embd' has no rule; there are batch, length"):
        Rules().spec(("batch", "embd"))
    with axis_rules(Rules().pairs()), pytest.raises(ValueError, match="'embd' has no rule"):
        constrain(jnp.ones((2, 2)), "batch", "embd")


def test_none_is_replicated_and_rules_can_be_replaced():
    assert Rules().spec((None, "embed", "mlp")) == PartitionSpec(None, None, "tensor")
    assert Rules(mlp=None, embed="fsdp").spec(("embed", "mlp")) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("shape", "names", "sizes", "spec"),
    [
        ((32, 64), ("embed", "features"), {"fsdp": 2}, (None, "fsdp")),
        ((64, 64), ("embed", "features"), {"fsdp": 2}, ("fsdp", None)),
        ((30, 31), ("embed", "features"), {"fsdp": 2}, ("fsdp", None)),  # the largest does not divide
        ((32, 64), ("embed", "mlp"), {"fsdp": 2, "tensor": 4}, ("fsdp", "tensor")),
        ((64, 32), ("heads", "embed"), {"fsdp": 2, "tensor": 4}, ("tensor", "fsdp")),
        ((32, 64), ("embed", "features"), {"fsdp": 2, "tensor": 4}, (None, ("fsdp", "tensor"))),
        ((36, 30), ("embed", "features"), {"fsdp": 2, "tensor": 4}, ("fsdp", None)),  # not into eight
        ((32, 64), ("embed", "mlp"), {"tensor": 8}, (None, "tensor")),
        ((512, 4, 6), ("layers", "embed", "features"), {"fsdp": 2}, (None, None, "fsdp")),
        ((32, 64), ("embed", "mlp"), {"context": 2}, ()),
    ],
)
def test_the_largest_axis_that_is_left_and_divides_lies_on_fsdp(shape, names, sizes, spec):
    shapes, axes = {"a": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"a": names}
    place = param_shardings(make_mesh(**sizes), Rules(), shapes, axes, min_size=0)["a"]
    assert place.is_equivalent_to(jax.NamedSharding(place.mesh, PartitionSpec(*spec)), len(shape))


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((30, 7), {"fsdp": 4}, ("'embed' of 30", "4 devices", "'fsdp'", "28 or 32")),
        ((32, 6), {"tensor": 4}, ("'mlp' of 6", "4 devices", "'tensor'", "4 or 8")),
        ((32, 2), {"tensor": 4}, ("'mlp' of 2", "4 devices", "; 4 would")),
    ],
)
def test_an_axis_that_does_not_divide_names_parameter_size_and_remedy(shape, sizes, words):
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    with pytest.raises(UserError) as error:
        param_shardings(make_mesh(**sizes), Rules(), shapes, {"a": {"kernel": ("embed", "mlp")}}, min_size=0)
    for word in ("['a']['kernel']", str(shape), *words):
        assert word in str(error.value)


def test_small_parameters_are_replicated():
    shapes, axes = {"a": jax.ShapeDtypeStruct((9, 8, 8), jnp.float32)}, {"a": ("layers", "embed", "features")}
    mesh = make_mesh(fsdp=2)
    assert param_shardings(mesh, Rules(), shapes, axes, min_size=65)["a"].is_fully_replicated
    assert not param_shardings(mesh, Rules(), shapes, axes, min_size=64)["a"].is_fully_replicated


def train(network, mesh, steps=3):
    """The state and the losses after some steps on a mesh."""

    def loss_fn(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        out = network.apply({"params": params}, batch["x"] + noise, batch["logsnr"], batch["cond"])
        loss = jnp.mean((out - noise) ** 2, axis=(1, 2, 3))
        return BatchLoss(loss, loss, jnp.zeros(len(loss)), batch["logsnr"])

    params = boxed(network)
    places = param_shardings(mesh, Rules(), unbox(params), logical_axes(params), min_size=256)
    state = create_state(init(network, jax.random.key(0)), OPTIMIZER)
    shardings = state_shardings(jax.eval_shape(lambda: state), OPTIMIZER, mesh, places)
    state = jax.device_put(state, shardings)
    draw = lambda batch, key, history: (batch, key)  # noqa: E731
    step = make_train_step(draw, loss_fn, OPTIMIZER, decay=ema.warm(decay=0.9), learning_rate=RATE)
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    x, logsnr, cond = inputs()
    batch = put_batch({"x": x, "logsnr": logsnr}, mesh) | {"cond": jax.device_put(cond, batch_sharding(mesh))}
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    losses = []
    with jax.set_mesh(mesh), axis_rules(Rules().pairs()):
        for _ in range(steps):
            state, metrics = update(state, batch, key)
            losses.append(float(metrics["loss"]))
    return state, losses


LAYOUTS = {
    "data": {},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 2, "tensor": 2},
    "context": {"fsdp": 2, "context": 2},
    "all": {"fsdp": 2, "tensor": 2, "context": 2},
}


@functools.cache
def trained(name, layout):
    """The state and the losses after two updates, in a layout of `LAYOUTS` or on one device."""
    return train(NETWORKS[name], make_mesh(**LAYOUTS[layout]) if layout else one_device(), steps=2)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) == ("dit", "tensor") else pytest.mark.slow)
        for name in ("dit", "unrolled_dit", "efficient_unet")
        for layout in LAYOUTS
    ]
    + [pytest.param(name, "tensor", marks=pytest.mark.slow) for name in ("unet", "mmdit", "unet2d")],
)
def test_eight_devices_do_what_one_does(name, layout):
    if (name, layout) == ("efficient_unet", "all"):
        with pytest.raises(UserError, match=r"mesh.context=1 or mesh.tensor=1"):
            trained(name, layout)
        return
    (expected, expected_losses), (state, losses) = trained(name, ""), trained(name, layout)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    # SGD: parameters and momentum are sums of gradients.
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(expected), atol=1e-5, rtol=1e-5)


def test_rows_are_divided_where_there_are_enough():
    place = jax.jit(lambda x: constrain(x, "batch", "height", "width", "channels"))
    for rows, held in ((8, 4), (6, 6), (4, 4)):
        with jax.set_mesh(make_mesh(context=2)), axis_rules(Rules().pairs()):
            y = place(jnp.ones((4, rows, 3, 2)))
        assert y.addressable_shards[0].data.shape == (1, held, 3, 2)


def test_parameters_average_and_momentum_lie_in_parts():
    state, _ = trained("dit", "tensor")
    trace = optax.tree_utils.tree_get(state.opt_state, "trace")
    total = held = 0
    for tree in (state.params, state.ema_params, trace):
        for leaf in jax.tree.leaves(tree):
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert len(sizes) == 1
            total, held = total + leaf.size, held + sizes.pop()
    assert held == pytest.approx(total / 4, rel=0.1)


def test_heads_that_do_not_divide_are_named_before_anything_is_compiled():
    network, arguments = DiT(patch=4, embed=24, depth=1, heads=3), inputs()
    shapes = unbox(jax.eval_shape(network.init, jax.random.key(0), *arguments))
    error = pytest.raises(UserError, match=r"3 heads .* over 2 devices; 2 or 4 would")
    with jax.set_mesh(make_mesh(tensor=2)), axis_rules(Rules().pairs()), error:
        jax.eval_shape(network.apply, shapes, *arguments)


def constraints(text):
    return re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, (\[[^\]]*\])>", text)


def test_activations_are_constrained_under_a_mesh_and_rules():
    mesh = make_mesh(fsdp=2)

    # Made outside the mesh, as by a training run: inside it Flax would constrain them by itself.
    shapes = {name: unbox(boxed(network)) for name, network in NETWORKS.items()}

    def lowered(name):
        network, params, arguments = NETWORKS[name], shapes[name], inputs()
        apply = jax.jit(lambda params, given: network.apply({"params": params}, *given))
        return apply.lower(params, arguments).as_text()

    # The batch takes both mesh axes: a width on `fsdp` as well would divide the same devices twice.
    with jax.set_mesh(mesh), axis_rules(Rules().pairs()):
        batch = '{"data", "fsdp"}'
        assert set(constraints(lowered("dit"))) == {
            f"[{batch}, {{}}]",
            f'[{batch}, {{"tensor"}}]',
            f'[{batch}, {{"context"}}, {{}}]',
            f'[{batch}, {{"context"}}, {{"tensor"}}]',
            f'[{batch}, {{"context"}}, {{"tensor"}}, {{}}]',
        }
        assert f'[{batch}, {{"context"}}, {{}}, {{"tensor"}}]' in constraints(lowered("unet"))
    assert constraints(lowered("dit")) == []


def test_the_compiled_program_holds_an_activation_as_constrained():
    mesh = make_mesh(fsdp=2)

    def double(x):
        return constrain(2 * x, "batch", "length", "embed")

    with jax.set_mesh(mesh), axis_rules(Rules().pairs()):
        out = jax.jit(double)(jax.device_put(jnp.ones((16, 3, 8)), replicated(mesh)))
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 3, 8)}
    np.testing.assert_array_equal(jax.jit(double)(jnp.ones((16, 3, 8))), 2.0)
