from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from diffjax.errors import UserError
from diffjax.nn import kernels
from diffjax.nn.kernels import attend, use_kernel
from diffjax.nn.placement import axis_rules
from diffjax.parallel.rules import Rules

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "blocks.npz")
TORCH = {name.removeprefix("attention/"): GOLDEN[name] for name in GOLDEN if name.startswith("attention/")}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def case(length, keys, head_dim, *, mask=False, bias=False, causal=False, batch=2, dtype=jnp.float32):
    """Arguments of `attend`."""
    arrays = [normal(i, batch, n, 2, head_dim, dtype=dtype) for i, n in enumerate((length, keys, keys))]
    seen = jnp.asarray(np.random.default_rng(3).random((batch, keys)) < 0.5).at[:, keys // 2].set(True)
    options = {"mask": seen} if mask else {}
    return arrays, options | ({"bias": normal(4, 1, 2, length, keys)} if bias else {}) | {"causal": causal}


def value_and_gradients(arrays, options, function=attend):
    """What comes out, and the gradients with respect to query, key, value and, if there is one, bias."""
    weights = normal(5, *arrays[0].shape)
    biases = [options["bias"]] if "bias" in options else []

    def loss(query, key, value, *bias):
        y = function(query, key, value, **options | ({"bias": bias[0]} if bias else {}), scale=0.3)
        return (y * weights).sum(), y

    gradients, y = jax.jit(jax.grad(loss, tuple(range(3 + len(biases))), has_aux=True))(*arrays, *biases)
    return [y, *gradients]


def assert_same(actual, expected, tolerance=2e-6):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=tolerance * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("long", [False, True])
def test_xla_agrees_with_pytorch(long, monkeypatch):
    monkeypatch.setattr(kernels, "LONG", 1 if long else 1024**2)
    inputs = [jnp.asarray(TORCH[name]) for name in ("query", "key", "value", "bias")]

    def loss(query, key, value, bias):
        y = attend(query, key, value, mask=jnp.asarray(TORCH["mask"]), bias=bias, scale=0.3)
        return (y * TORCH["cotangent"]).sum(), y

    with use_kernel("xla"):
        gradients, y = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*inputs)
        causal = attend(*inputs[:3], causal=True, scale=0.3)
    np.testing.assert_allclose(y, TORCH["masked"], atol=1e-5)
    np.testing.assert_allclose(causal, TORCH["causal"], atol=1e-5)
    for name, gradient in zip(("query", "key", "value", "bias"), gradients, strict=True):
        np.testing.assert_allclose(gradient, TORCH[f"grad_{name}"], atol=1e-5)


def test_the_softmax_is_taken_in_float32():
    arrays, _ = case(4, 33, 8, dtype=jnp.bfloat16)
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    logits = np.einsum("bqhd,bkhd->bhqk", 8.0 * query, key)  # large: rounding them to bfloat16 would be seen
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), value)
    y = attend(*arrays, scale=8.0)
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected) < 4e-3


@pytest.mark.parametrize("long", [False, True])
def test_xla_is_differentiable_in_forward_mode_and_twice(long, monkeypatch):
    monkeypatch.setattr(kernels, "LONG", 1 if long else 1024**2)
    (query, key, value), options = case(3, 5, 4, mask=True, bias=True)
    tangent, cotangent = normal(6, *query.shape), normal(7, *query.shape)
    attention = lambda query: attend(query, key, value, **options)  # noqa: E731

    with use_kernel("xla"):
        y, forward = jax.jit(lambda q: jax.jvp(attention, (q,), (tangent,)))(query)
        shifted = [attention(query + step * tangent) for step in (1e-2, -1e-2)]
        np.testing.assert_allclose(forward, (shifted[0] - shifted[1]) / 2e-2, atol=1e-3)
        np.testing.assert_array_equal(y, jax.jit(attention)(query))
        (backward,) = jax.vjp(attention, query)[1](cotangent)
        np.testing.assert_allclose((forward * cotangent).sum(), (backward * tangent).sum(), rtol=1e-4)
        of_forward = jax.grad(lambda q: jax.jvp(attention, (q,), (tangent,))[1].sum())(query)
    assert float(jnp.abs(of_forward).max()) > 1e-3


def test_long_products_are_not_kept_for_the_backward_pass():
    x, layers, length = jnp.zeros((1, 1024, 1, 8)), jnp.zeros((8, 8)), 1024

    def loss(x, layers):
        return jax.lax.scan(lambda x, w: (x + attend(x * w, x, x), None), x, layers)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(x, layers).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * length**2
    )  # a copy for each of eight layers


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((130, 70, 16), {"mask": True, "bias": True}), ((200, 140, 160), {"causal": True})],
    ids=["masked", "causal"],
)
def test_flash_does_the_same(sizes, options):
    arrays, options = case(*sizes, **options, batch=1)
    with use_kernel("xla"):
        expected = value_and_gradients(arrays, options)
    with use_kernel("flash", platform="tpu"), pltpu.force_tpu_interpret_mode():
        assert_same(value_and_gradients(arrays, options), expected)


@pytest.mark.parametrize("options", [{"mask": True}, {}, {"causal": True}], ids=["masked", "plain", "causal"])
def test_cudnn_is_told_the_same(options, monkeypatch):
    """What surrounds the call of cuDNN, with JAX's formula in its place."""
    formula, told = jax.nn.dot_product_attention, []

    def instead(query, key, value, **kwargs):
        assert kwargs.pop("implementation") == "cudnn"
        assert query.shape[1] % 128 == key.shape[1] % 128 == 0
        told.append(kwargs["key_value_seq_lengths"] is not None)
        return formula(query, key, value, implementation="xla", **kwargs)

    arrays, options = case(5, 77, 8, **options)
    expected = value_and_gradients(arrays, options)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)

    def cudnn(query, key, value, mask=None, bias=None, *, causal, scale):
        return kernels.cudnn(query, key, value, mask, bias, causal, scale)

    assert_same(value_and_gradients(arrays, options, cudnn), expected)
    cudnn(*case(128, 256, 8)[0], causal=False, scale=1.0)
    assert told == [True, False]  # lengths that fill their blocks need no telling


@pytest.mark.parametrize("length", [1, 77, 128, 257, 1024, 1101, 4096, 4173])
def test_blocks_are_large_and_filled(length):
    block = kernels.flash_block(length)
    fill = -length % block
    assert block == 128 or fill <= length // 8
    assert block == 512 or -length % (2 * block) > length // 8


def program(platform, arrays, options, kernel="auto"):
    """The text of a training step of attention, lowered for a platform that need not be there."""

    def loss(*arrays):
        return attend(*arrays, **options).astype(jnp.float32).sum()

    with use_kernel(kernel, platform={"cuda": "gpu"}.get(platform, platform)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def abstract(*args, **kwargs):
    arrays, options = case(*args, **{"dtype": jnp.bfloat16, **kwargs})
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays], options


CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


@pytest.mark.parametrize(
    ("args", "kwargs", "fits"),
    [
        ((256, 256, 64), {}, True),
        ((1024, 77, 40), {"mask": True}, True),
        ((77, 77, 64), {}, False),  # too little to do
        ((77, 77, 64), {"kernel": "cudnn", "causal": True}, True),
        ((256, 256, 64), {"dtype": jnp.float32}, False),
        ((256, 256, 64), {"bias": True}, False),
        ((256, 256, 64), {"causal": True, "mask": True}, False),
        ((256, 256, 160), {}, False),
        ((256, 256, 36), {}, False),
    ],
)
def test_what_is_lowered_for_cuda(args, kwargs, fits, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    kernel = kwargs.pop("kernel", "auto")
    text = program("cuda", *abstract(*args, **kwargs), kernel=kernel)
    assert [name in text for name in CUDNN] == [fits, fits]


def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "fits"),
    [
        ((1024, 1077, 72), {"mask": True}, True),
        ((256, 256, 64), {}, False),  # too little to do
        ((4096, 77, 40), {"kernel": "flash", "mask": True}, True),
        ((1024, 1024, 64), {"dtype": jnp.float16}, False),
    ],
)
def test_what_is_lowered_for_tpus(args, kwargs, fits):
    kernel = kwargs.pop("kernel", "auto")
    with jax.set_mesh(mesh()), axis_rules(Rules().pairs()):
        text = program("tpu", *abstract(*args, **kwargs, batch=4), kernel=kernel)
    assert ("@tpu_custom_call" in text) == fits


def test_auto_leaves_to_xla_what_it_could_not_divide():
    arrays, options = abstract(1024, 1024, 64)
    assert jax.device_count() > 1
    assert "custom_call" not in program("tpu", arrays, options)  # no mesh: one device or all of them?
    with jax.set_mesh(mesh()):
        assert "custom_call" not in program("cpu", arrays, options)


@pytest.mark.parametrize("causal", [False, True])
def test_each_device_computes_its_part(causal):
    arrays, options = case(8, 6, 4, mask=True, bias=True, causal=causal, batch=4)
    options["mask"] = options["mask"].at[:, 0].set(True)
    expected = value_and_gradients(arrays, options)
    shapes = []

    def spy(query, key, *rest):
        shapes.append((query.shape, key.shape))
        return kernels.xla(query, key, *rest)

    def divided(query, key, value, *, mask, bias, causal, scale):
        return kernels.each_device(spy)(query, key, value, mask, bias, causal, scale)

    rules = {**Rules()._asdict(), "batch": ("data", "absent"), "length": "fsdp", "heads": "tensor"}
    with jax.set_mesh(mesh()), axis_rules(list(rules.items())):
        assert_same(value_and_gradients(arrays, options, divided), expected)
        assert shapes[0] == ((2, 8 if causal else 4, 1, 4), (2, 6, 1, 4))
        arrays, options = case(8, 6, 4, mask=True, bias=True, causal=causal, batch=3)
        value_and_gradients(arrays, options, divided)  # three examples do not divide: everyone has them all
    assert shapes[-1][0][0] == 3


def test_a_kernel_that_cannot_do_it_says_why():
    arrays, options = case(4, 4, 8, bias=True)
    for kernel, platform, reason in (
        (
            "flash",
            "cpu",
            "(?s)'flash': this kernel runs on TPUs, not on cpu; choose 'auto' or 'xla'.*float32",
        ),
        ("cudnn", "tpu", "'cudnn': this kernel runs on GPUs, not on tpu"),
        ("cudnn", "gpu", "takes bfloat16 or float16, not float32"),
    ):
        with use_kernel(kernel, platform=platform), pytest.raises(UserError, match=reason):
            attend(*arrays, **options)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    with use_kernel("cudnn", platform="gpu"):
        with pytest.raises(UserError, match="takes no bias"):
            attend(*half, **options)
        with pytest.raises(UserError, match="takes no mask if it is causal"):
            attend(*half, mask=jnp.ones((2, 4), bool), causal=True)
        with pytest.raises(UserError, match="multiples of 8, not 7"):
            attend(*(x[..., :7] for x in half))
    with (
        pytest.raises(UserError, match="'fast' does not exist; there are: auto, xla, cudnn, flash"),
        use_kernel("fast"),
    ):
        pass


def test_what_was_traced_with_one_kernel_is_traced_again_with_another():
    arrays, _ = case(4, 4, 8)
    jitted = jax.jit(attend)
    jitted(*arrays)
    with use_kernel("flash"), pytest.raises(UserError, match="runs on TPUs"):
        jitted(*arrays)
    jitted(*arrays)


def test_forward_mode_needs_xla():
    (query, *rest), _ = case(4, 4, 8)

    @jax.jit
    def tangent(query):
        return jax.jvp(lambda query: attend(query, *rest), (query,), (query,))[1]

    with use_kernel("flash", platform="tpu"):
        with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
            tangent.trace(query).lower(lowering_platforms=("tpu",))
        with use_kernel("xla"):
            assert np.isfinite(tangent(query)).all()
