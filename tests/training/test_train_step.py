import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.diffusion import resampling
from diffjax.diffusion.losses import BatchLoss
from diffjax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from diffjax.training import ema
from diffjax.training.optimizer import adamw
from diffjax.training.state import count_params, create_state, init_sharded
from diffjax.training.step import LOGSNR_EDGES, compile_train_step, make_train_step

RATE = optax.linear_schedule(0.1, 0.05, 100)
OPTIMIZER = adamw(RATE)
TARGET = jnp.asarray([1.0, -2.0, 0.5])


def init(key):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}


def losses_of(params, batch, key):
    """Linear regression with noise on the target, so that randomness shows in the gradient."""
    noise = jax.random.normal(key, batch["x"].shape[:1])
    return (batch["x"] @ (params["w"] - TARGET) + params["b"] + 0.01 * noise) ** 2


def draw(batch, key, history):
    return batch, key


def loss_fn(params, batch, key):
    loss = losses_of(params, batch, key)
    t = jnp.linspace(0.05, 0.95, loss.shape[0])
    return BatchLoss(loss, 2.0 * loss, t, 20.0 * t)


DECAY = ema.warm(decay=0.9)
PLAIN = jax.jit(make_train_step(draw, loss_fn, OPTIMIZER, decay=DECAY, learning_rate=RATE, skip_bad=False))
STEP = jax.jit(make_train_step(draw, loss_fn, OPTIMIZER, decay=DECAY, learning_rate=RATE))


def state(seed=0):
    return create_state(init(jax.random.key(seed)), OPTIMIZER)


def batch(seed=0):
    return {"x": jax.random.normal(jax.random.key(100 + seed), (8, 3))}


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def test_the_step_number_counts_updates():
    new, _ = STEP(state(), batch(), jax.random.key(0))
    newer, _ = STEP(new, batch(), jax.random.key(0))
    assert (int(new.step), int(newer.step)) == (1, 2)
    assert new.step.dtype == jnp.int32


def test_randomness_comes_from_the_key_and_the_step_only():
    first, _ = STEP(state(), batch(), jax.random.key(0))
    again, _ = STEP(state(), batch(), jax.random.key(0))
    other_key, _ = STEP(state(), batch(), jax.random.key(1))
    other_step, _ = STEP(state()._replace(step=jnp.asarray(1)), batch(), jax.random.key(0))
    assert same(first, again)
    assert not same(first.opt_state, other_key.opt_state)
    assert not same(first.opt_state, other_step.opt_state)


def test_metrics_are_of_the_parameters_before_the_update():
    start = state()._replace(step=jnp.asarray(50))
    key = jax.random.fold_in(jax.random.key(0), 50)
    _, metrics = STEP(start, batch(), jax.random.key(0))
    loss, grads = jax.value_and_grad(lambda params: losses_of(params, batch(), key).mean())(start.params)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(0.075)


def test_the_average_follows_the_new_parameters():
    start = state()._replace(step=jnp.asarray(5), ema_params=jax.tree.map(jnp.zeros_like, state().params))
    new, _ = STEP(start, batch(), jax.random.key(0))
    decay = 6 / 15
    np.testing.assert_allclose(new.ema_params["w"], (1 - decay) * np.asarray(new.params["w"]), rtol=1e-5)
    assert float(ema.decay_at(jnp.asarray(5), 0.9)) == pytest.approx(decay)


def test_the_loss_goes_down():
    current, losses = state(), []
    for i in range(120):
        current, metrics = STEP(current, batch(i), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 1e-2 < losses[0]
    np.testing.assert_allclose(current.params["w"], TARGET, atol=0.1)


def test_the_state_is_donated_and_the_batch_is_not():
    mesh = make_mesh()
    places = {"w": replicated(mesh), "b": replicated(mesh)}
    start = init_sharded(init, OPTIMIZER, jax.random.key(0), mesh, places)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, start)
    step = make_train_step(draw, loss_fn, OPTIMIZER, decay=DECAY, learning_rate=RATE)
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    placed = put_batch({"x": np.asarray(batch()["x"])}, mesh)
    new, _ = update(start, placed, jax.device_put(jax.random.key(0), replicated(mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    assert not placed["x"].is_deleted()
    expected, _ = STEP(state(), batch(), jax.random.key(0))
    for one, other in zip(leaves(new), leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_new_state_starts_its_average_at_the_parameters_in_buffers_of_its_own():
    new = state()
    assert same(new.params, new.ema_params)
    assert int(new.step) == 0
    assert count_params(new.params) == 4
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((new.params, new.ema_params))]
    assert len(set(buffers)) == len(buffers)


def test_the_objective_is_minimised_and_the_loss_is_reported_by_noise_level():
    start, key = state(), jax.random.key(3)
    _, metrics = STEP(start, batch(), key)
    loss = np.asarray(losses_of(start.params, batch(), jax.random.fold_in(key, 0)))
    curve = {name: value for name, value in metrics.items() if name.startswith("loss_by_logsnr/")}
    assert len(curve) == len(LOGSNR_EDGES) - 1
    np.testing.assert_allclose(sum(float(share.examples) for share in curve.values()), 8.0)
    # Levels are 20 t, with t from 0.05 to 0.95.
    level = 20.0 * np.linspace(0.05, 0.95, 8)
    chosen = (level >= 4.0) & (level < 8.0)
    share = curve["loss_by_logsnr/4_to_8"]
    assert float(share.examples) == chosen.sum() > 0
    np.testing.assert_allclose(float(share.total), 2.0 * loss[chosen].sum(), rtol=1e-5)
    np.testing.assert_allclose(float(metrics["loss"]), loss.mean(), rtol=1e-5)


def test_the_loss_history_is_part_of_the_state():
    history = resampling.init(bins=4, length=2)
    start = create_state(init(jax.random.key(0)), OPTIMIZER, history)
    new, _ = STEP(start, batch(), jax.random.key(0))
    expected = resampling.update(
        history,
        jnp.linspace(0.05, 0.95, 8),
        2.0 * losses_of(start.params, batch(), jax.random.fold_in(jax.random.key(0), 0)),
    )
    np.testing.assert_allclose(new.history.losses, expected.losses, rtol=1e-5)
    np.testing.assert_array_equal(new.history.counts, expected.counts)
    assert int(new.history.counts.sum()) == 8


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step_number(value):
    start, _ = STEP(state(), batch(), jax.random.key(0))  # so that no part of the state is zero
    spoilt = {"x": batch(1)["x"].at[2, 1].set(value)}
    after, metrics = STEP(start, spoilt, jax.random.key(0))
    assert int(after.step) == 2
    assert float(metrics["skipped"]) == 1.0
    assert same(after._replace(step=start.step), start)
    again, metrics = STEP(after, batch(2), jax.random.key(0))
    assert float(metrics["skipped"]) == 0.0
    assert not same(again._replace(step=start.step), start)


def test_a_gradient_that_is_not_finite_is_enough():
    def root(params, batch, key):  # finite at 0, where its derivative is not
        loss = jnp.sqrt(jnp.abs(params["w"]).sum()) * jnp.ones(8)
        return BatchLoss(loss, loss, loss, loss)

    step = make_train_step(draw, root, OPTIMIZER, decay=DECAY, learning_rate=RATE)
    start = create_state({"w": jnp.zeros(3)}, OPTIMIZER)
    after, metrics = jax.jit(step)(start, batch(), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert float(metrics["skipped"]) == 1.0
    assert same(after._replace(step=start.step), start)


def test_the_losses_that_times_are_drawn_by_stay_numbers():
    history = resampling.init()
    start = state()._replace(history=history)
    # Of one bad example the history would take no notice by itself, but of the others.
    after, _ = STEP(start, {"x": batch()["x"].at[0].set(jnp.nan)}, jax.random.key(0))
    assert same(after.history, history)


def test_a_sound_update_is_what_it_would_have_been():
    start, _ = STEP(state(), batch(), jax.random.key(0))
    plain, _ = PLAIN(start, batch(1), jax.random.key(0))
    safe, metrics = STEP(start, batch(1), jax.random.key(0))
    assert same(safe, plain)
    assert float(metrics["skipped"]) == 0.0
