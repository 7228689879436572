import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.attention import Attention, heads_of
from diffjax.nn.layers import zeros
from diffjax.nn.placement import axis_rules, logical_axes, unbox
from diffjax.parallel.collectives import traffic
from diffjax.parallel.mesh import make_mesh
from diffjax.parallel.rules import Rules, param_shardings


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomised(module, *inputs):
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.4, leaf.shape), jnp.float32), shapes)


def reference(params, heads, x, context=None, mask=None):
    """Attention as it is written in books, one head of one example at a time, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    context = x if context is None else np.asarray(context, np.float64)
    query, key, value = (
        source @ p[name]["kernel"] + p[name]["bias"]
        for name, source in (("query", x), ("key", context), ("value", context))
    )
    width = x.shape[-1] // heads
    y = np.zeros_like(query)
    for example in range(len(x)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[example][:, part] @ key[example][:, part].T / width**0.5
            if mask is not None:
                logits[:, ~np.asarray(mask[example])] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            y[example][:, part] = weights @ value[example][:, part]
    return y @ p["out"]["kernel"] + p["out"]["bias"]


MASK = jnp.array([[True, True, False, True, False], [False, True, False, False, False]])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["self", "cross", "masked"])
def test_attention_is_that_of_the_books(heads, kind):
    x = normal(0, 2, 3, 8)
    inputs = {"self": (x,), "cross": (x, normal(1, 2, 5, 6)), "masked": (x, normal(1, 2, 5, 6), MASK)}[kind]
    module = Attention(heads)
    params = randomised(module, *inputs)
    y = jax.jit(module.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(y, reference(params, heads, *inputs), atol=2e-5)
    low = jax.jit(Attention(heads, dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert low.dtype == jnp.bfloat16
    assert 0.0 < float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y)) < 0.03


def test_masked_keys_and_other_examples_do_not_matter():
    x, context = normal(0, 2, 3, 8), normal(1, 2, 5, 6)
    module = Attention(2)
    params = randomised(module, x, context, MASK)
    apply = jax.jit(lambda x, context: module.apply({"params": params}, x, context, MASK))
    y = apply(x, context)
    np.testing.assert_array_equal(apply(x, context.at[0, 2].set(1e3).at[1, 0].set(-1e3)), y)
    changed = apply(x, context.at[0, 1].add(1.0))
    assert float(jnp.abs(changed - y)[0].max()) > 1e-3
    np.testing.assert_array_equal(changed[1], y[1])


def test_huge_logits_do_not_overflow():
    x = 100.0 * normal(0, 1, 3, 8)
    module = Attention(2)
    params = randomised(module, x)
    assert np.isfinite(module.apply({"params": params}, x)).all()


def test_a_zero_output_makes_a_new_layer_silent():
    x = normal(0, 2, 3, 8)
    y, _ = jax.jit(Attention(2, out_init=zeros).init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, jnp.zeros_like(x))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        Attention(3).init(jax.random.key(0), normal(0, 2, 3, 8))


class Heads(nn.Module):
    """Three heads of four features, normed or not."""

    norm: str
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        return heads_of(x, ["query"], 3, 4, use_bias=False, norm=self.norm, norm_eps=self.eps)[0]


@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_each_head_of_queries_is_normed_by_itself(norm):
    x = normal(0, 2, 5, 6)
    params = randomised(Heads(norm), x)
    y = jax.jit(Heads(norm, 0.1).apply)({"params": params}, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = (np.asarray(x, np.float64) @ p["query"]["kernel"]).reshape(2, 5, 3, 4)
    if norm == "layer":
        expected = expected - expected.mean(axis=-1, keepdims=True)
    if norm:
        expected = expected / np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 0.1)
        assert p["query_norm"]["scale"].shape == (4,)  # one for all heads
        expected = expected * p["query_norm"]["scale"] + p["query_norm"].get("bias", 0.0)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_queries_and_keys_are_normed_and_values_are_not():
    x, context = normal(0, 2, 3, 8), normal(1, 2, 5, 6)
    module = Attention(2, qk_norm="rms", use_bias=False, out_bias=False)
    params = randomised(module, x, context)
    assert set(params) == {"query", "query_norm", "key", "key_norm", "value", "out"}
    apply = jax.jit(lambda params: module.apply({"params": params}, x, context))

    def times(factor, *names):
        return params | {name: jax.tree.map(lambda leaf: factor * leaf, params[name]) for name in names}

    y = apply(params)
    np.testing.assert_allclose(
        apply(times(50.0, "query", "key")), apply(times(40.0, "query", "key")), atol=1e-5
    )
    np.testing.assert_allclose(apply(times(3.0, "value")), 3.0 * y, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(apply(times(2.0, "query_norm")) - y).max()) > 1e-3
    assert float(jnp.abs(apply(times(2.0, "key_norm")) - y).max()) > 1e-3


def test_bias_scale_and_causality_are_passed_on():
    x = normal(0, 2, 4, 8)
    module = Attention(2)
    params = randomised(module, x)

    def apply(module=module, x=x, **options):
        return module.apply({"params": params}, x, **options)

    y = apply()
    nowhere = apply(bias=jnp.zeros((1, 2, 4, 4)).at[:, :, :, 1].set(-1e9))
    np.testing.assert_allclose(nowhere, apply(mask=jnp.ones((2, 4), bool).at[:, 1].set(False)), atol=1e-5)
    assert float(jnp.abs(nowhere - y).max()) > 1e-3
    np.testing.assert_allclose(apply(causal=True)[:, :2], apply(x=x[:, :2], causal=True), atol=1e-5)
    assert float(jnp.abs(apply(causal=True)[:, 0] - y[:, 0]).max()) > 1e-3
    np.testing.assert_allclose(apply(module.clone(scale=0.5)), y, atol=1e-6)  # the default, of heads of 4
    assert float(jnp.abs(apply(module.clone(scale=1.0)) - y).max()) > 1e-3


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_over_divided_heads_the_gradient_of_each_input_is_summed_once(kind):
    x = normal(0, 2, 3, 16)
    inputs = (x,) if kind == "self" else (x, normal(1, 2, 5, 6))
    module = Attention(8, qk_norm="rms")
    params = randomised(module, *inputs)
    axes = logical_axes(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])

    def loss(params, inputs):
        return jnp.sum(module.apply({"params": params}, *inputs) ** 2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = gradients(params, inputs)
    mesh = make_mesh(tensor=8)
    placed = jax.device_put(params, param_shardings(mesh, Rules(), params, axes, min_size=1))
    with jax.set_mesh(mesh), axis_rules(Rules().pairs()):
        divided = gradients.lower(placed, inputs).compile()
        chex.assert_trees_all_close(jax.device_get(divided(placed, inputs)), expected, rtol=1e-4, atol=1e-4)
    # A ring of eight sends 7/8 twice: of the output, of each input, of the norms' scales of two numbers each.
    numbers = 2 * 3 * 16 + sum(each.size for each in inputs) + 2 * 2
    assert traffic(divided.as_text())["all-reduce"].bytes == 2 * 7 * 4 * numbers // 8
