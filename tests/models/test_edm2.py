import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from networks import GOLDEN, backward, channels_last, compiled, randomised, relative_error
from tiny_networks import NETWORKS

from diffjax.models.edm2 import EDM2UNet, MagnitudeBlock
from diffjax.nn.conditioning import NO_LABEL, Cond

TINY = NETWORKS["edm2"].net


@functools.cache
def golden():
    """The case of tests/golden/make_edm2.py: its arrays, its parameters, and the arguments of the network."""
    arrays = dict(np.load(GOLDEN / "edm2.npz"))
    params = {key.removeprefix("param:"): value for key, value in arrays.items() if key.startswith("param:")}
    inputs = jnp.asarray(channels_last(arrays["x"])), jnp.asarray(arrays["level"])
    return arrays, unflatten_dict(params, sep="/"), (*inputs, Cond(label=jnp.asarray(arrays["label"])))


def test_output_and_gradients_are_those_of_the_equations():
    arrays, params, inputs = golden()
    cotangent = channels_last(arrays["cotangent"])
    (out,), of_params, of_inputs = backward(TINY)(params, inputs, [cotangent])
    assert relative_error(out, channels_last(arrays["out"])) < 1e-4
    assert relative_error(of_inputs["0"], channels_last(arrays["grad_x"])) < 1e-4
    assert relative_error(of_inputs["1"], arrays["grad_level"]) < 1e-4
    expected = {key.removeprefix("grad:"): value for key, value in arrays.items() if key.startswith("grad:")}
    assert len(expected) > 12
    for path, gradient in expected.items():
        assert relative_error(of_params[path], gradient) < 1e-4, path


def test_level_and_label_are_read_as_they_say():
    _, params, (x, level, cond) = golden()
    run = compiled(TINY)
    out = run(params, x, level, cond)
    logsnr = compiled(TINY.clone(time_input="logsnr"))
    np.testing.assert_allclose(logsnr(params, x, -8.0 * level, cond), out, rtol=1e-5, atol=1e-5)

    other = run(params, x, level, Cond(label=jnp.array([NO_LABEL, NO_LABEL, 0])))
    changed = np.abs(other - out).max(axis=(1, 2, 3))
    assert min(changed[0], changed[2]) > 1e-3
    assert changed[1] == 0.0
    with pytest.raises(ValueError, match="conditioned on classes"):
        run(params, x, level, Cond())
    with pytest.raises(ValueError, match="time_input is 'time'"):
        compiled(TINY.clone(time_input="time"))(params, x, level, cond)


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
    out = compiled(net)(gains | {"gain": jnp.ones(())}, *inputs)
    assert 0.6 < float(jnp.std(out)) < 1.6


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
        jax.eval_shape(TINY.clone(**attributes).init, jax.random.key(0), *golden()[2])
