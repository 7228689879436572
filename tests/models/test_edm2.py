import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import GOLDEN, channels_last, num_params, randomised, relative_error

from diffjax.models.edm2 import SIZES, EDM2UNet, MagnitudeBlock
from diffjax.nn.conditioning import NO_LABEL, Cond

TINY = EDM2UNet(
    channels=4, multipliers=(1, 2), blocks=3, attention=(False, True), head_dim=4, classes=5, out_channels=3
)

ONE_LEVEL = TINY.clone(multipliers=(1,), attention=(True,), blocks=2)


@functools.cache
def golden():
    """The case of tests/golden/make_edm2.py: its arrays, its parameters, and the arguments of the network."""
    arrays = dict(np.load(GOLDEN / "edm2.npz"))
    params = {key.removeprefix("param:"): value for key, value in arrays.items() if key.startswith("param:")}
    inputs = jnp.asarray(channels_last(arrays["x"])), jnp.asarray(arrays["level"])
    return arrays, unflatten_dict(params, sep="/"), (*inputs, Cond(label=jnp.asarray(arrays["label"])))


def apply(net, params, x, level, cond):
    return net.apply({"params": params}, x, level, cond)


def gradients(net, params, x, level, cond, cotangent):
    """What the network makes of its inputs, and the gradients by them."""

    def weighted(params, x, level):
        out = apply(net, params, x, level, cond)
        return (out * cotangent).sum(), out

    return jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(params, x, level)


def test_output_and_gradients_are_those_of_the_equations():
    arrays, params, inputs = golden()
    cotangent = channels_last(arrays["cotangent"])
    (of_params, of_x, of_level), out = gradients(TINY, params, *inputs, cotangent)
    assert relative_error(out, channels_last(arrays["out"])) < 1e-4
    assert relative_error(of_x, channels_last(arrays["grad_x"])) < 1e-4
    assert relative_error(of_level, arrays["grad_level"]) < 1e-4
    expected = {key.removeprefix("grad:"): value for key, value in arrays.items() if key.startswith("grad:")}
    assert len(expected) > 12
    flat = flatten_dict(of_params, sep="/")
    for path, gradient in expected.items():
        assert relative_error(flat[path], gradient) < 1e-4, path


def test_an_unrolled_loop_changes_nothing():
    arrays, params, inputs = golden()
    out = jax.jit(functools.partial(apply, TINY.clone(scan=False)))(params, *inputs)
    assert relative_error(out, channels_last(arrays["out"])) < 1e-4


def test_remat_changes_nothing_but_memory():
    inputs = golden()[2]
    params = randomised(ONE_LEVEL, *inputs, scale=1.0)
    results = []
    for net in (ONE_LEVEL, ONE_LEVEL.clone(remat="full")):
        jaxpr = str(jax.make_jaxpr(functools.partial(apply, net))(params, *inputs))
        assert ("remat" in jaxpr) == bool(net.remat)
        grads, out = gradients(net, params, *inputs, inputs[0])
        results.append(jax.tree.leaves((grads, out)))
    assert float(jnp.abs(results[0][-1]).max()) > 0.1
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-4


def flat_golden():
    _, params, inputs = golden()
    return (params, *inputs)


def test_bfloat16_is_near_float32_which_it_returns():
    out = channels_last(golden()[0]["out"])
    low = jax.jit(functools.partial(apply, TINY.clone(dtype=jnp.bfloat16)))(*flat_golden())
    assert low.dtype == jnp.float32
    assert 1e-5 < relative_error(low, out) < 0.05


def test_level_and_label_are_read_as_they_say():
    params, x, level, cond = flat_golden()
    run = jax.jit(functools.partial(apply, TINY))
    out = run(params, x, level, cond)
    logsnr = jax.jit(functools.partial(apply, TINY.clone(time_input="logsnr")))
    np.testing.assert_allclose(logsnr(params, x, -8.0 * level, cond), out, rtol=1e-5, atol=1e-5)

    other = run(params, x, level, Cond(label=jnp.array([NO_LABEL, NO_LABEL, 0])))
    changed = np.abs(other - out).max(axis=(1, 2, 3))
    assert min(changed[0], changed[2]) > 1e-3
    assert changed[1] == 0.0
    with pytest.raises(ValueError, match="conditioned on classes"):
        run(params, x, level, Cond())
    with pytest.raises(ValueError, match="time_input is 'time'"):
        apply(TINY.clone(time_input="time"), params, x, level, cond)


def test_a_new_network_predicts_zero():
    _, x, level, cond = flat_golden()
    gain = jax.jit(
        lambda key: TINY.init(key, x, level, cond)["params"]["gain"].value
    )  # times all it predicts
    assert gain(jax.random.key(0)) == 0.0


@pytest.mark.parametrize("attributes", [{}, {"encoder": False}, {"encoder": False, "head_dim": 8}])
def test_blocks_keep_the_magnitude(attributes):
    block = MagnitudeBlock(32, **attributes)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 32))
    vector = jax.random.normal(jax.random.key(1), (2, 8))
    out, _ = jax.jit(block.init_with_output)(jax.random.key(2), x, vector)
    assert 0.8 < float(jnp.std(out)) < 1.25


def test_a_random_network_keeps_the_magnitude():
    net = EDM2UNet(channels=16, multipliers=(1, 2), blocks=1, attention=(False, True), head_dim=16, classes=0)
    inputs = jax.random.normal(jax.random.key(0), (2, 16, 16, 4)), jnp.zeros(2), Cond()
    params = randomised(net, *inputs, scale=1.0)
    gains = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "direction" else jnp.zeros_like(leaf), params
    )
    out = jax.jit(functools.partial(apply, net))(gains | {"gain": jnp.ones(())}, *inputs)
    assert 0.6 < float(jnp.std(out)) < 1.6


def test_dropout_acts_in_training_only():
    inputs = golden()[2]
    params = randomised(ONE_LEVEL, *inputs, scale=1.0)
    net = ONE_LEVEL.clone(dropout=0.5)
    train = jax.jit(
        lambda key: net.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key})
    )
    assert relative_error(train(jax.random.key(0)), train(jax.random.key(1))) > 1e-2
    still, plain = (
        str(jax.make_jaxpr(functools.partial(apply, n))(params, *inputs)) for n in (net, ONE_LEVEL)
    )
    assert still == plain  # and no rng was needed


@pytest.mark.parametrize(
    ("name", "millions"), [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)]
)
def test_published_sizes(name, millions):
    cond = Cond(label=jnp.zeros(1, jnp.int32))
    net = EDM2UNet(**SIZES[name])
    assert round(num_params(net, jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), cond) / 1e6) == millions


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"attention": (True,)}, r"attention is \(True,\); expected one for each of \(1, 2\)"),
        ({"multipliers": (1, 2, 2, 2), "attention": (False,) * 4}, r"images of \(8, 4\) cannot be halved 3"),
        ({"head_dim": 3}, "8 channels do not divide into heads 3 wide"),
    ],
)
def test_contradicting_attributes_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**attributes).init, jax.random.key(0), *flat_golden()[1:])
