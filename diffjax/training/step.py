"""One update: a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.training import ema
from diffjax.training.state import Params, TrainState

Batch = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, jax.Array], jax.Array]
"""`(params, batch, key) -> loss of each example, [batch]`."""

Metrics = dict[str, jax.Array]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    learning_rate: optax.Schedule,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Build the update.

    The returned function takes the run's key, the same at every step, and derives the step's randomness from
    it and the step number; a resumed run therefore draws what the uninterrupted one would have drawn.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)

        def mean_loss(params: Params) -> jax.Array:
            return jnp.mean(loss_fn(params, batch, step_key))

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = ema.update(state.ema_params, params, ema.decay_at(state.step, ema_decay))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return step


def compile_train_step(step: Any, shardings: TrainState, batch_sharding: Any, replicated: Any) -> Any:
    """Jit the update over the mesh. The state is donated: its buffers are reused for the new state."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
