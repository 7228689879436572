"""What every network must hold; a new one joins by a row of `tiny_networks.NETWORKS`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import backward, by_path, compiled, relative_error
from tiny_networks import DIT_OPTIONS, NETWORKS

from diffjax.nn.conditioning import Cond, drop_cond
from diffjax.nn.placement import logical_axes, unbox
from diffjax.parallel.rules import Rules


def networks(wanted=lambda tiny: True):
    """A test for every network that is `wanted`."""
    rows = [pytest.param(tiny, id=name) for name, tiny in NETWORKS.items() if wanted(tiny)]
    return pytest.mark.parametrize("tiny", rows)


def change(outputs, others):
    """By example, the largest difference of any output."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(others), strict=True)
    return np.max([np.abs(a - b).reshape(len(a), -1).max(1) for a, b in pairs], axis=0)


def axes_by_path(tiny):
    return by_path(logical_axes(tiny.boxed), is_leaf=lambda leaf: isinstance(leaf, tuple))[0]


@networks()
def test_the_prediction_depends_on_every_input_and_on_no_other_example(tiny):
    before = tiny()
    assert jax.tree.leaves(before)[0].shape == tiny.inputs[0].shape
    for output in jax.tree.leaves(before):
        assert output.dtype == jnp.float32
        assert 0.05 < float(output.std()) < 50.0  # the comparisons below mean something
    for name, inputs in tiny.moved():
        moved = change(tiny(*inputs), before)
        assert moved[1] > 1e-3, name
        assert moved[0] == moved[2] == 0.0, name


@networks()
def test_gradients_reach_every_parameter_and_no_other_example(tiny):
    _, by_params, _ = tiny.backward()
    unused = set()
    for path, axes in axes_by_path(tiny).items():
        # The outputs of a layer count, too: each shift, scale and gate is a slice of one kernel's.
        summed = tuple(i for i, axis in enumerate(axes[:-1]) if axis != "layers")
        reach = np.abs(by_params[path]).max(axis=summed)
        if reach.max() < 1e-5 or np.mean(reach < 1e-6 * reach.max()) > 0.05:  # an activation may be flat
            unused.add(path)
    assert unused == {path for path in by_params if tiny.unused and path.endswith(tiny.unused)}
    for name, gradient in tiny.backward(0)[2].items():
        assert jnp.any(gradient[0]), name
        assert not jnp.any(gradient[1:]), name


WAYS = [pytest.param(t, way, id=f"{name}-{way}") for name, t in NETWORKS.items() for way in t.ways]


@pytest.mark.slow
@pytest.mark.parametrize(("tiny", "way"), WAYS)
def test_it_is_the_same_network_computed_in_another_way(tiny, way):
    net, given = tiny.way(way), ({"params": tiny.params}, *tiny.inputs)
    jaxpr, plain = (str(jax.make_jaxpr(one.apply)(*given)) for one in (net, tiny.net))
    assert jaxpr != plain
    assert [("remat" in text) for text in (jaxpr, plain)] == ["remat" in way, False]
    if "remat" in way:
        (out, *gradients), (expected, *expected_gradients) = tiny.backward(way=way), tiny.backward()
    else:
        out, expected, gradients = compiled(net)(tiny.params, *tiny.inputs), tiny(), []
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        if way == "bfloat16":
            assert 1e-5 < jnp.linalg.norm(one - other) / jnp.linalg.norm(other) < 0.05
        else:
            assert relative_error(one, other) < 1e-6
    for found, other in zip(gradients, expected_gradients if gradients else [], strict=True):
        for path, gradient in other.items():
            if not (tiny.unused and path.endswith(tiny.unused)):  # else it is rounding
                assert relative_error(found[path], gradient) < 1e-5, path


@networks()
def test_every_parameter_has_axes_that_the_rules_know(tiny):
    axes = axes_by_path(tiny)
    for path, shape in flatten_dict(unbox(tiny.boxed), sep="/").items():
        assert len(axes[path]) == shape.ndim, path
        assert None not in axes[path], path
        Rules().spec(axes[path])  # raises at a name without a rule, as `boxed` did at those of activations
        assert shape.dtype == jnp.float32, path


@networks(lambda tiny: tiny.last)
def test_a_new_network_predicts_zero_and_its_gates_are_closed(tiny):
    def fresh(key):
        params = flatten_dict(unbox(tiny.net.init(key, *tiny.inputs)["params"]), sep="/")
        return {path: leaf for path, leaf in params.items() if path.startswith((tiny.last, *tiny.gates))}

    new = jax.jit(fresh)(jax.random.key(0))
    assert all(any(path.startswith(gate) for path in new) for gate in (tiny.last, *tiny.gates))
    assert not any(jnp.any(leaf) for leaf in new.values())
    assert not jnp.any(tiny(**{tiny.last: jax.tree.map(jnp.zeros_like, tiny.params[tiny.last])}))


def is_masked(tiny):
    return isinstance(tiny.inputs[-1], Cond) and tiny.inputs[-1].mask is not None


@networks(is_masked)
def test_hidden_words_and_the_vector_of_a_dropped_text_do_not_matter(tiny):
    x, level, cond = tiny.inputs
    conds = [cond]
    if not cond.mask.any(1).all():  # no text is something that it knows
        conds.append(drop_cond(cond, jnp.array([True, False, False])))
        assert change(tiny(x, level, conds[1]), tiny())[0] > 1e-3
    for given in conds:
        other = given._replace(text=jnp.where(given.mask[..., None], given.text, 7.0))
        if cond.pooled is not None:
            other = other._replace(pooled=jnp.where(given.mask.any(1, keepdims=True), given.pooled, 7.0))
        assert not change(tiny(x, level, given), tiny(x, level, other)).any()


@pytest.mark.slow
@networks(lambda tiny: hasattr(tiny.net, "dropout"))
def test_dropout_acts_in_training_only(tiny):
    net = tiny.net.clone(dropout=0.5)
    still = jax.make_jaxpr(net.apply)({"params": tiny.params}, *tiny.inputs)  # needs no rng
    assert str(still) == str(jax.make_jaxpr(tiny.net.apply)({"params": tiny.params}, *tiny.inputs))

    def train(net, **rngs):
        return net.apply({"params": tiny.params}, *tiny.inputs, deterministic=False, rngs=rngs)

    jax.eval_shape(functools.partial(train, tiny.net))  # a rate of zero needs no rng either
    run = jax.jit(lambda key: train(net, dropout=key))
    assert relative_error(run(jax.random.key(0)), run(jax.random.key(1))) > 1e-2


@pytest.mark.parametrize("name", DIT_OPTIONS)
def test_every_option_of_dit_trains(name):
    """The noise of a few pictures of coloured squares is predicted better and better, by every parameter."""
    tiny = NETWORKS[f"dit {name}"]
    _, _, cond = tiny.inputs
    random = np.random.default_rng(0)
    pictures = np.kron(random.choice([-1.0, 1.0], size=(3, 2, 1, 3)), np.ones((1, 4, 4, 1)))
    noise = random.normal(size=pictures.shape)
    level = np.float32([300.0, 600.0, 900.0])
    part = (level / 1000.0)[:, None, None, None]
    inputs = jnp.asarray(pictures * (1.0 - part) + noise * part, jnp.float32), jnp.asarray(level), cond
    xavier = tiny.net.clone(initializer="xavier")
    initial = jax.jit(lambda key: xavier.init(key, *inputs)["params"])
    params = start = flatten_dict(unbox(initial(jax.random.key(0))), sep="/")

    optimizer, losses = optax.adam(5e-3), []
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(30):
        nested = unflatten_dict(params, sep="/")
        error = compiled(tiny.net)(nested, *inputs) - noise
        losses.append(float(jnp.mean(error**2)))
        _, gradients, _ = backward(tiny.net)(nested, inputs, [2.0 * error / error.size])
        updates, state = update(gradients, state)
        params = optax.apply_updates(params, updates)
    assert losses[-1] < 0.6 * losses[0]
    for path, new in params.items():
        if not path.endswith("key/bias"):  # which no softmax feels
            assert float(jnp.abs(new - start[path]).max()) > 1e-4, path
