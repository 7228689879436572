import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import randomised

from diffjax.nn.kernels import use_kernel
from diffjax.nn.layers import dense
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain, logical_axes, unbox
from diffjax.nn.repeat import REMAT, once, repeat


class Block(nn.Module):
    """`(carry, shared, each=None) -> carry`."""

    @nn.compact
    def __call__(self, x, shared, each=None):
        y = Mlp(4 * x.shape[-1], name="mlp")(x) * shared
        return constrain(x + jnp.sin(y if each is None else y * each), "batch", "embed")


class Chain(nn.Module):
    length: int = 3
    scan: bool = True
    remat: str = ""
    collect: bool = False
    apart: bool = True

    @nn.compact
    def __call__(self, x, shared, each=None):
        x = dense(x.shape[-1], name="first")(x)
        block = Block(name="blocks")
        settings = {"scan": self.scan, "remat": self.remat, "collect": self.collect, "apart": self.apart}
        return repeat(block, self.length, x, shared, each=each, **settings)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, SHARED, EACH = normal(0, 2, 8), normal(1, 8), normal(2, 3, 2, 8)
PARAMS = randomised(Chain(), X, SHARED)


def one_by_one(params, x, shared, each=None):
    """What comes out of each block, called with its part of the stacked parameters."""
    x, seen = x @ params["first"]["kernel"] + params["first"]["bias"], []
    for i in range(3):
        own = jax.tree.map(lambda leaf: leaf[i], params["blocks"])  # noqa: B023
        x = Block().apply({"params": own}, x, shared, *([] if each is None else [each[i]]))
        seen.append(x)
    return x, jnp.stack(seen)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("each", [None, EACH])
def test_it_is_one_block_after_the_other(scan, each):
    chain = Chain(scan=scan, collect=True)
    last, seen = jax.jit(chain.apply)({"params": PARAMS}, X, SHARED, each)
    expected_last, expected_seen = one_by_one(PARAMS, X, SHARED, each)
    np.testing.assert_allclose(last, expected_last, atol=1e-6)
    np.testing.assert_allclose(seen, expected_seen, atol=1e-6)
    assert chain.clone(collect=False).apply({"params": PARAMS}, X, SHARED, each)[1] is None


def test_parameters_are_stacked_and_drawn_apart_whether_rolled_or_not():
    initial = [
        jax.jit(Chain(scan=scan).init)(jax.random.key(0), X, SHARED)["params"] for scan in (True, False)
    ]
    kernel = unbox(initial[0])["blocks"]["mlp"]["in"]["kernel"]
    assert kernel.shape == (3, 8, 32)
    assert len(np.unique(kernel[:, 0, 0])) == 3
    assert logical_axes(initial[0])["blocks"]["mlp"]["in"]["kernel"] == ("layers", "embed", "mlp")
    jax.tree.map(np.testing.assert_array_equal, *map(unbox, initial))


def test_only_the_rolled_program_has_a_loop():
    for scan in (True, False):
        text = jax.jit(Chain(scan=scan).apply).lower({"params": PARAMS}, X, SHARED).as_text()
        assert ("stablehlo.while" in text) == scan


def calls(**settings):
    """The number of calls in the compiled program."""
    program = jax.jit(Chain(**settings).apply).lower({"params": PARAMS}, X, SHARED)
    return program.compile().as_text().count(" call(")


def test_unrolled_blocks_stay_apart_on_cpus_only():
    assert calls(scan=False) == 3
    assert calls(scan=False, apart=False) == 0
    with use_kernel("xla", platform="tpu"):
        assert calls(scan=False) == 0


@pytest.mark.parametrize("scan", [True, False])
def test_forward_derivatives_pass_through(scan):
    tangent = normal(3, *X.shape)

    def derivative(run):
        return jax.jit(lambda x: jax.jvp(run, (x,), (tangent,))[1])(X)

    np.testing.assert_allclose(
        derivative(lambda x: Chain(scan=scan).apply({"params": PARAMS}, x, SHARED)[0]),
        derivative(lambda x: one_by_one(PARAMS, x, SHARED)[0]),
        rtol=1e-4,
        atol=1e-5,
    )


def gradients(x, **settings):
    def loss(params):
        return (Chain(**settings).apply({"params": params}, x, SHARED)[0] ** 2).sum()

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_gives_the_same_gradients(scan, remat):
    expected = jax.jit(jax.grad(lambda params: (one_by_one(params, X, SHARED)[0] ** 2).sum()))(PARAMS)
    found = gradients(X, scan=scan, remat=remat)(PARAMS)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4), found, expected
    )


def test_remat_stores_less():
    x = jnp.zeros((512, 8))
    memory = {
        remat: gradients(x, length=12, remat=remat)
        .lower(randomised(Chain(12), x, SHARED))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for remat in REMAT
    }
    assert memory["full"] < memory["dots"] < memory[""]
    assert memory["full"] < memory[""] / 3


def test_no_blocks_give_the_carry_back():
    chain = Chain(0)
    params = randomised(chain, X, SHARED)
    assert set(params) == {"first"}
    last, seen = chain.apply({"params": params}, X, SHARED)
    np.testing.assert_allclose(last, X @ params["first"]["kernel"] + params["first"]["bias"], atol=1e-6)
    assert seen is None


def test_remat_must_exist():
    with pytest.raises(ValueError, match="remat is 'some'; expected one of '', 'full', 'dots'"):
        Chain(remat="some").init(jax.random.key(0), X, SHARED)


class Single(nn.Module):
    remat: str = ""

    @nn.compact
    def __call__(self, x):
        return once(Block(name="block"), x, SHARED, remat=self.remat)


def test_once_is_the_block_with_its_parameters_where_they_were():
    params = randomised(Single(), X)
    expected = Block().apply({"params": params["block"]}, X, SHARED)
    for remat in REMAT:
        module = Single(remat)
        np.testing.assert_allclose(module.apply({"params": params}, X), expected, atol=1e-6)
        assert ("remat" in str(jax.make_jaxpr(module.apply)({"params": params}, X))) == bool(remat)
    with pytest.raises(ValueError, match="remat is 'some'"):
        Single("some").init(jax.random.key(0), X)
