"""Optimizers that leave out what is not finite: the same as optax's otherwise, and at no cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.diffusion.losses import BatchLoss
from diffjax.training import ema
from diffjax.training.optimizer import OPTIMIZERS, adamw, kernels
from diffjax.training.skipping import Skipping, skipping
from diffjax.training.state import create_state
from diffjax.training.step import make_train_step

RATE = optax.linear_schedule(0.1, 0.01, 5)
MADE = {
    "adamw": OPTIMIZERS["adamw"](RATE, weight_decay=0.1),
    "unclipped": OPTIMIZERS["adamw"](RATE, clip_norm=0.0),
    "bfloat16": OPTIMIZERS["adamw"](RATE, moments="bfloat16"),
    "int8": OPTIMIZERS["adamw"](RATE, moments="int8"),
    "adafactor": OPTIMIZERS["adafactor"](RATE),
    "any": skipping(optax.lion(RATE)),
}
SHAPES = {"kernel": (64, 128), "bias": (128,)}


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(0, scale, shape), jnp.float32) for name, shape in SHAPES.items()}


def run(optimizer, gradients, *, told=True):
    """The parameters after updates by these gradients, and the memory; `told` if it can skip."""
    params = tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        finite = bool(np.isfinite(grads["bias"]).all())
        updates, state = update(grads, state, params, **({"finite": jnp.asarray(finite)} if told else {}))
        if finite:
            params = optax.apply_updates(params, updates)
    return params, state


def spoilt(seed, value):
    grads = tree(seed)
    return {**grads, "bias": grads["bias"].at[3].set(value)}


@pytest.mark.parametrize(("clip_norm", "weight_decay"), [(1.0, 0.1), (0.0, 0.0), (1e6, 0.1)])
def test_adamw_is_optaxs(clip_norm, weight_decay):
    theirs = optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=kernels)
    if clip_norm:
        theirs = optax.chain(optax.clip_by_global_norm(clip_norm), theirs)
    ours = adamw(RATE, b1=0.9, b2=0.95, weight_decay=weight_decay, clip_norm=clip_norm)
    gradients = [tree(seed, 10.0 ** -(seed % 3)) for seed in range(1, 8)]
    found, expected = run(ours, gradients), run(theirs, gradients, told=False)
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # checkpoints of either fit the other
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("optimizer", MADE.values(), ids=MADE)
def test_what_is_left_out_might_never_have_been(optimizer, value):
    assert isinstance(optimizer, Skipping)
    sound = [tree(seed) for seed in range(1, 5)]
    mixed = [spoilt(8, value), *sound[:2], spoilt(9, value), spoilt(10, -value), *sound[2:]]
    found, expected = (run(optimizer, each) for each in (mixed, sound))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(np.asarray(one, np.float32)).all()
        np.testing.assert_array_equal(one, other)


def test_an_optimizer_is_made_to_skip_once():
    assert skipping(MADE["adamw"]) is MADE["adamw"]


def test_the_state_is_written_where_it_lies():
    """No parameter, moment or average is copied or kept twice for the sake of the rule."""

    def loss_fn(params, grads, key):
        loss = jnp.stack([jnp.vdot(params[name], grads[name]) for name in SHAPES])
        return BatchLoss(loss, loss, loss, loss)

    def draw(batch, key, history):
        return batch, key

    large = {"kernel": jnp.zeros((512, 512)), "bias": jnp.zeros(512)}
    state = create_state(large, MADE["adamw"])
    step = make_train_step(draw, loss_fn, MADE["adamw"], decay=ema.warm(), learning_rate=RATE)
    compiled = jax.jit(step, donate_argnums=0).lower(state, large, jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < large["kernel"].nbytes / 2
    # Seven passes over the gradients and the state's four parts to read and to write, and a few to spare.
    assert compiled.cost_analysis()["bytes accessed"] < 20 * large["kernel"].nbytes
