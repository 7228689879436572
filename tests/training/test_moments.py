"""Moments of fewer bits: what they cost, where they lie, and that training ends as with float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.diffusion.losses import BatchLoss
from diffjax.errors import UserError
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.training import ema, moments
from diffjax.training import state as states
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.moments import Blocks, round_to_bfloat16
from diffjax.training.optimizer import adafactor, adamw
from diffjax.training.state import HOST, create_state, init_sharded, state_shardings
from diffjax.training.step import compile_train_step, make_train_step

KINDS = ("bfloat16", "int8")
RATE = optax.constant_schedule(1e-2)


def spread(seed=0, shape=(64, 128)):
    """Numbers of either sign and of many sizes."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape) * 10.0 ** random.uniform(-4, 0, shape), jnp.float32)


def mean_of(pack, unpack, x, draws=400):
    keys = jax.random.split(jax.random.key(0), draws)
    one = jax.jit(lambda key: unpack(pack(x, key)))
    return np.asarray(jax.lax.map(one, keys).mean(axis=0)), np.asarray(one(keys[0]))


def test_bfloat16_is_one_of_the_two_nearest_and_right_on_average():
    x = spread()
    mean, one = mean_of(round_to_bfloat16, moments.unpack, x)
    np.testing.assert_allclose(one, x, rtol=2.0**-7)
    assert set(np.unique(np.sign(one - np.asarray(x)))) >= {-1.0, 1.0}
    # A draw is off by half a unit of the last place at most (2^-8), the mean of 400 by a twentieth of it.
    np.testing.assert_allclose(mean, x, rtol=5 * 2.0**-8 / 20)
    kept = round_to_bfloat16(jnp.asarray([0.0, 1.0, -2.0, jnp.inf, jnp.nan]), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(kept, np.float32), [0.0, 1.0, -2.0, np.inf, np.nan])


@pytest.mark.parametrize(("pack", "unpack", "sign"), [
    (moments.pack_signed, moments.unpack, 1),
    (moments.pack_squares, moments.unpack_squares, 0),
])  # fmt: skip
def test_eight_bits_are_right_on_average_and_within_a_code(pack, unpack, sign):
    x = spread() if sign else spread() ** 2
    mean, one = mean_of(pack, unpack, x)
    largest = np.abs(np.asarray(x)).reshape(64, 2, 64).max(axis=-1, keepdims=True)
    value, one, mean = (np.asarray(array).reshape(64, 2, 64) for array in (x, one, mean))
    if sign:
        step = np.broadcast_to(largest / 127, value.shape)
    else:
        step = (2 * np.sqrt(value / largest) * 255 + 1) * largest / 255**2
        assert (one > 0.0).all()
        # What is below the smallest code is that code.
        value = np.maximum(value, largest / 255**2)
    assert (np.abs(one - value) <= 1.001 * step).all()
    assert (np.abs(mean - value) <= 5 * step / 2 / 20 + 1e-12).all()
    np.testing.assert_allclose(np.abs(one).max(axis=-1, keepdims=True), largest, rtol=1e-5)


def test_zeros_stay_zeros():
    for codec in moments.CODECS["int8"]:
        kept = codec.pack(jnp.zeros((64, 64)), jax.random.key(0))
        assert isinstance(kept, Blocks)
        np.testing.assert_array_equal(codec.unpack(kept), jnp.zeros((64, 64)))


@pytest.mark.parametrize(
    ("last", "block"), [(4608, 64), (1152, 64), (48, 16), (20, 20), (3, 3), (77, 77), (96, 32)]
)
def test_block_sizes(last, block):
    assert moments.block_size((5, last)) == block


def test_bytes_of_the_state():
    params = {"kernel": jnp.zeros((128, 640)), "bias": jnp.zeros(640)}
    count, small = 128 * 640, 640
    for kind, expected in {"float32": 8.0 * count, "bfloat16": 4.0 * count, "int8": 2.125 * count}.items():
        leaves = jax.tree.leaves(adamw(RATE, moments=kind).init(params))
        sizes = sum(leaf.nbytes for leaf in leaves if leaf.ndim)
        assert sizes == expected + small * (4 if kind == "bfloat16" else 8), kind


def regression(kind, *, b2=0.999, steps=300):
    """The mean loss of the last steps of a small network that learns a larger one's output."""
    random = np.random.default_rng(0)
    teacher = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((16, 64), (64, 4))]
    start = {"a": jnp.asarray(random.normal(0, 0.25, (16, 256)), jnp.float32),
             "b": jnp.asarray(random.normal(0, 0.06, (256, 128)), jnp.float32),
             "c": jnp.asarray(random.normal(0, 0.09, (128, 4)), jnp.float32)}  # fmt: skip
    optimizer = optax.chain(
        optax.scale_by_adam(b2=b2)
        if kind == "float32"
        else moments.scale_by_adam(b1=0.9, b2=b2, moments=kind),
        optax.scale_by_learning_rate(2e-3),
    )

    def loss_of(params, key):
        x = jax.random.normal(key, (64, 16))
        y = jnp.tanh(x @ teacher[0]) @ teacher[1] / 8.0
        hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.mean((hidden @ params["c"] - y) ** 2)

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, key)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    carry = (start, optimizer.init(start))
    _, losses = jax.jit(lambda: jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), steps)))()
    return float(losses[-50:].mean()), float(losses[0])


def test_training_ends_where_it_does_with_float32():
    expected, first = regression("float32")
    assert expected < 0.3 * first
    for kind in KINDS:
        assert regression(kind)[0] == pytest.approx(expected, rel=0.05), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_moment_falls_when_gradients_do(kind):
    # Rounded to the nearest value, it would stay where it is: a step changes it by a thousandth.
    optimizer = moments.scale_by_adam(b1=0.9, b2=0.999, moments=kind)
    params = jnp.zeros((64, 64))
    big = jnp.ones_like(params).at[:, 0].set(2.0)

    @jax.jit
    def run():
        state = optimizer.init(params)
        _, state = optimizer.update(big, state)
        step = lambda i, state: optimizer.update(1e-3 * big.at[:, 0].set(2000.0), state)[1]  # noqa: E731
        return jax.lax.fori_loop(0, 1000, step, state)

    second = moments.CODECS[kind][1].unpack(run().nu)
    np.testing.assert_allclose(second[:, 1:].mean(), 0.001 * 0.999**1000, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_lies_where_parameters_do_and_a_checkpoint_keeps_it(kind, tmp_path):
    mesh = make_mesh(fsdp=8)
    optimizer = adamw(RATE, moments=kind)
    init = lambda key: {"layer": {"kernel": jax.random.normal(key, (32, 1024))}}  # noqa: E731
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    places = {"layer": {"kernel": place}}
    state = init_sharded(init, optimizer, jax.random.key(0), mesh, places)
    kept = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(kept) == (4 if kind == "int8" else 2)
    assert all(leaf.sharding == place for leaf in kept)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(draw, loss_fn, optimizer, decay=ema.warm(), learning_rate=RATE)
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    batch = {"x": jax.device_put(jnp.ones((8, 32)), batch_sharding(mesh))}
    for _ in range(2):
        state, _ = update(state, batch, jax.device_put(jax.random.key(1), replicated(mesh)))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    restored, _ = checkpoints.restore(abstract)
    checkpoints.close()
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def draw(batch, key, history):
    return batch["x"], key


def loss_fn(params, x, key):
    loss = jnp.mean((x @ params["layer"]["kernel"] - 1.0) ** 2, axis=1)
    return BatchLoss(loss, loss, jnp.full(len(loss), 0.5), jnp.zeros(len(loss)))


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_moments_that_there_are_not(make):
    with pytest.raises(ValueError, match=r"moments is 'int4'.*expected 'float32'"):
        make(RATE, moments="int4")


class TestOffload:
    def test_the_memory_lies_on_the_host_and_the_update_is_the_same(self):
        mesh = make_mesh(fsdp=8)
        optimizer = adamw(RATE)
        init = lambda key: {"layer": {"kernel": jax.random.normal(key, (32, 1024))}}  # noqa: E731
        places = {"layer": {"kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp"))}}
        found = []
        for offload in (False, True):
            state = init_sharded(init, optimizer, jax.random.key(0), mesh, places, offload=offload)
            shardings = state_shardings(state, optimizer, mesh, places, offload=offload)
            step = make_train_step(draw, loss_fn, optimizer, decay=ema.warm(), learning_rate=RATE)
            update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
            batch = {"x": jax.device_put(jnp.ones((8, 32)), batch_sharding(mesh))}
            for _ in range(2):
                kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
                assert kinds == ({HOST} if offload else {"device"})
                assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
                state, _ = update(state, batch, jax.device_put(jax.random.key(1), replicated(mesh)))
            found.append(state)
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)

    def test_devices_that_cannot_reach_the_host_are_refused(self, monkeypatch):
        monkeypatch.setattr(states, "HOST", "another kind")
        optimizer = adamw(RATE)
        shapes = jax.eval_shape(lambda: create_state({"w": jnp.zeros(3)}, optimizer))
        mesh = make_mesh()
        with pytest.raises(UserError, match=r"set optimizer\.offload=False"):
            state_shardings(shapes, optimizer, mesh, {"w": replicated(mesh)}, offload=True)
