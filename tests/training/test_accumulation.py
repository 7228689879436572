"""Gradients in parts of the batch, and what the compiled update moves and keeps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import stage as stages
from diffjax.config import stage_config
from diffjax.experiment import build_stage, build_update
from diffjax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from diffjax.parallel.rules import Rules, on_mesh, param_shardings
from diffjax.training import ema
from diffjax.training.state import create_state, state_shardings
from diffjax.training.step import compile_train_step, gradients

BATCH = 32
# Parameters and momentum are sums of gradients.
SGD = optax.sgd(0.1, momentum=0.9)


def config_of(**diffusion):
    config = stage_config()
    config.resolution, config.low_res.resolution = 8, 4
    config.text.length = 3
    config.model = {"name": "dit", "patch": 4, "embed": 16, "depth": 2, "heads": 2, "cross_attention": False}
    for key, value in diffusion.items():
        config.diffusion[key] = value
    return config


@functools.cache
def model_of(**diffusion):
    return build_stage(config_of(**diffusion), text_embed=5)


def params_of(model):
    """Parameters without zeros."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(random.normal(0.0, 0.2, s.shape), jnp.float32), model.shapes)


def batch():
    random = np.random.default_rng(1)
    return {
        "image": random.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8),
        "text": random.normal(size=(BATCH, 3, 5)).astype(np.float16),
        "mask": np.ones((BATCH, 3), bool),
        "pooled": random.normal(size=(BATCH, 5)).astype(np.float32),
    }


def compiled(mesh, accumulate, model):
    """The update on a mesh, its state, its batch and its key."""
    places = param_shardings(mesh, Rules(), model.shapes, model.axes, min_size=256)
    history = jax.tree.map(jnp.copy, model.history)  # the update takes its buffers
    state = create_state(params_of(model), SGD, history)
    shardings = state_shardings(state, SGD, mesh, places)
    step = build_update(
        model.stage, SGD, optax.constant_schedule(0.1), ema.warm(decay=0.9), accumulate=accumulate
    )
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    return update, jax.device_put(state, shardings), put_batch(batch(), mesh), key


def trained(mesh, accumulate, model, steps=2):
    update, state, data, key = compiled(mesh, accumulate, model)
    losses = []
    with on_mesh(mesh):
        for _ in range(steps):
            state, metrics = update(state, data, key)
            losses.append(jax.device_get(metrics))
    return jax.device_get(state), losses


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def expected():
    return trained(one_device(), 1, model_of())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}], ids=["data", "fsdp"])
def test_four_parts_on_eight_devices_are_one_batch_on_one(sizes):
    state, metrics = trained(make_mesh(**sizes), 4, model_of())
    chex.assert_trees_all_close(state, expected()[0], atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(metrics, expected()[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_losses_keep_their_order_so_that_a_history_is_the_same():
    model = model_of(resample=True)
    one, parts = (trained(one_device(), accumulate, model)[0] for accumulate in (1, 8))
    assert int(one.history.counts.sum()) == 2 * BATCH
    np.testing.assert_array_equal(one.history.counts, parts.history.counts)
    np.testing.assert_allclose(one.history.losses, parts.history.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_have_equal_shares_of_each_device_and_dropout_of_their_own(parts):
    seen = []

    def loss_fn(params, x, key):
        jax.debug.callback(lambda x, u: seen.append((x.tolist(), float(u))), x, jax.random.uniform(key))
        return stages.BatchLoss(params * x, x, x, x)

    grads, losses = jax.jit(functools.partial(gradients, loss_fn, parts=parts))(
        jnp.float32(1.0), jnp.arange(8.0), jax.random.key(0)
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(losses.loss, np.arange(8.0))
    assert float(grads) == 3.5
    shares = {tuple(x) for x, _ in seen}
    assert shares == {tuple(range(i, 8, parts)) for i in range(parts)}
    assert len({u for _, u in seen}) == parts


@pytest.mark.slow
def test_no_example_moves_between_devices():
    mesh = make_mesh()
    update, *arguments = compiled(mesh, 4, model_of())
    with on_mesh(mesh):
        text = update.lower(*arguments).compile().as_text()
    assert "all-reduce" in text
    for other in ("all-to-all", "collective-permute", "all-gather"):
        assert f" {other}(" not in text, other


def test_gradients_and_activations_in_parts_take_less_memory():
    def temporaries(accumulate):
        update, *arguments = compiled(one_device(), accumulate, model_of())
        with on_mesh(one_device()):
            return update.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.5 * temporaries(1)


def test_the_loop_moves_nothing_by_itself_and_compiles_once():
    mesh = make_mesh(fsdp=2)
    update, state, data, key = compiled(mesh, 2, model_of())
    with on_mesh(mesh):
        for step in range(4):
            with jax.transfer_guard("disallow"):
                state, _ = update(state, data, key)
            data = put_batch(batch(), mesh)
            if step == 1:
                before = update._cache_size()
    assert update._cache_size() == before == 1
