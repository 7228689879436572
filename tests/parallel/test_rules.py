import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from diffjax.diffusion.losses import BatchLoss
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.models.unet import UNet
from diffjax.nn.conditioning import Cond
from diffjax.nn.layers import axis_rules, constrain, logical_axes, unbox
from diffjax.parallel.mesh import AXES, batch_sharding, make_mesh, put_batch, replicated
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.training import ema
from diffjax.training.state import create_state, state_shardings
from diffjax.training.step import compile_train_step, make_train_step

LEVELS = {"blocks": (1, 1), "self_attention": (False, True), "cross_attention": (False, True), "head_dim": 8}
NETWORKS = {
    "dit": DiT(patch=4, embed=32, depth=2, heads=2),
    "unet": UNet(channels=8, multipliers=(1, 2), **LEVELS),
    "efficient_unet": UNet(channels=8, multipliers=(1, 2), efficient=True, **LEVELS),
}
RATE = optax.constant_schedule(0.1)
# Not Adam: it divides by the size of the gradient, and so makes rounding errors of zero gradients large.
OPTIMIZER = optax.sgd(RATE, momentum=0.9)


def inputs(batch=16, size=8):
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


def mesh_of(devices, fsdp):
    if devices == 8:
        return make_mesh(fsdp=fsdp)
    found = np.array(jax.devices()[:devices]).reshape(-1, fsdp)
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * 2)


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
        for place, shape in zip(*map(jax.tree.leaves, (places, shapes)), strict=True)
        if shape.size >= 400
    ]
    assert len(large) > 10
    assert all("fsdp" in place.spec for place in large)


def test_an_unknown_axis_is_an_error_and_not_replicated():
    with pytest.raises(ValueError, match="'embd' has no rule; there are batch, length"):
        Rules().spec(("batch", "embd"))
    with axis_rules(Rules().pairs()), pytest.raises(ValueError, match="'embd' has no rule"):
        constrain(jnp.ones((2, 2)), "batch", "embd")


def test_none_is_replicated_and_rules_can_be_replaced():
    assert Rules().spec((None, "embed", "mlp")) == PartitionSpec(None, "fsdp", None)
    assert Rules(mlp="fsdp", embed=None).spec(("embed", "mlp")) == PartitionSpec(None, "fsdp")


def test_an_axis_that_does_not_divide_names_parameter_size_and_remedy():
    shapes, axes = (
        {"a": {"kernel": jax.ShapeDtypeStruct((30, 7), jnp.float32)}},
        {"a": {"kernel": ("embed", "mlp")}},
    )
    with pytest.raises(UserError) as error:
        param_shardings(make_mesh(fsdp=4), Rules(), shapes, axes, min_size=0)
    for word in ("['a']['kernel']", "'embed' of 30", "4 devices", "28 or 32"):
        assert word in str(error.value)


def test_small_parameters_are_replicated():
    shapes, axes = {"a": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, {"a": ("embed", "mlp")}
    mesh = make_mesh(fsdp=2)
    assert param_shardings(mesh, Rules(), shapes, axes, min_size=65)["a"].spec == PartitionSpec()
    assert param_shardings(mesh, Rules(), shapes, axes, min_size=64)["a"].spec == PartitionSpec("fsdp", None)


def train(network, mesh, steps=3):
    """The state and the losses after some steps on a mesh."""

    def loss_fn(params, batch, key, history):
        noise = jax.random.normal(key, batch["x"].shape)
        out = network.apply({"params": params}, batch["x"] + noise, batch["logsnr"], batch["cond"])
        loss = jnp.mean((out - noise) ** 2, axis=(1, 2, 3))
        return BatchLoss(loss, loss, jnp.zeros(len(loss)), batch["logsnr"])

    params = boxed(network)
    places = param_shardings(mesh, Rules(), unbox(params), logical_axes(params), min_size=256)
    state = create_state(init(network, jax.random.key(0)), OPTIMIZER)
    shardings = state_shardings(jax.eval_shape(lambda: state), OPTIMIZER, mesh, places)
    state = jax.device_put(state, shardings)
    step = make_train_step(loss_fn, OPTIMIZER, decay=ema.warm(decay=0.9), learning_rate=RATE)
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


def test_eight_devices_do_what_one_does():
    network = DiT(patch=4, embed=32, depth=1, heads=2, cross_attention=False)
    expected, expected_losses = train(network, mesh_of(1, 1))
    for fsdp in (1, 2):
        state, losses = train(network, mesh_of(8, fsdp))
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for one, other in zip(
            jax.tree.leaves((state.params, state.ema_params)),
            jax.tree.leaves((expected.params, expected.ema_params)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, atol=1e-5)
    # The last state is the one of fsdp=2: parameters, average and momentum lie in halves.
    for tree in (state.params, state.ema_params, optax.tree_utils.tree_get(state.opt_state, "trace")):
        for leaf in jax.tree.leaves(tree):
            held = {shard.data.size for shard in leaf.addressable_shards}
            assert held == ({leaf.size // 2} if "fsdp" in leaf.sharding.spec else {leaf.size})
    divided = [leaf for leaf in jax.tree.leaves(state.params) if "fsdp" in leaf.sharding.spec]
    assert len(divided) > 10


@pytest.mark.slow
def test_eight_devices_do_what_one_does_with_convolutions():
    network = NETWORKS["efficient_unet"]
    expected, expected_losses = train(network, mesh_of(1, 1), steps=2)
    state, losses = train(network, mesh_of(8, 2), steps=2)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected.params), atol=1e-5)


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
        found = constraints(lowered("dit"))
        assert len(found) == 2
        assert set(found) == {'[{"data", "fsdp"}, {}, {}]'}
        assert set(constraints(lowered("unet"))) == {'[{"data", "fsdp"}, {}, {}, {}]'}
    assert constraints(lowered("dit")) == []


def test_the_compiled_program_holds_an_activation_as_constrained():
    mesh = make_mesh(fsdp=2)

    def double(x):
        return constrain(2 * x, "batch", "length", "embed")

    with jax.set_mesh(mesh), axis_rules(Rules().pairs()):
        out = jax.jit(double)(jax.device_put(jnp.ones((16, 3, 8)), replicated(mesh)))
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 3, 8)}
    np.testing.assert_array_equal(jax.jit(double)(jnp.ones((16, 3, 8))), 2.0)
