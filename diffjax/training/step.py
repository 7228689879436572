"""One update: a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.diffusion import resampling
from diffjax.diffusion.levels import by_level, level_names
from diffjax.diffusion.losses import BatchLoss
from diffjax.diffusion.resampling import LossHistory
from diffjax.training import ema
from diffjax.training.metrics import Share
from diffjax.training.state import Params, TrainState

Batch = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, jax.Array, LossHistory | None], BatchLoss]
"""`(params, batch, key, history) -> losses of the examples`; see `diffjax.stage.loss`."""

Metrics = dict[str, jax.Array | Share]

LOGSNR_EDGES = (-20.0, -12.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0, 12.0, 20.0)
"""Bounds of the noise levels whose losses are reported apart."""


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    decay: ema.Decay,
    learning_rate: optax.Schedule,
    project: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Build the update.

    What an update makes of the parameters passes through `project`, for networks whose parameters are bound
    to a set (EDM2's weights have a fixed magnitude).

    The returned function takes the run's key, the same at every step, and derives the step's randomness from
    it and the step number; a resumed run therefore draws what the uninterrupted one would have drawn.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)

        def mean_loss(params: Params) -> tuple[jax.Array, BatchLoss]:
            losses = loss_fn(params, batch, step_key, state.history)
            return jnp.mean(losses.objective), losses

        (loss, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = project(optax.apply_updates(state.params, updates))
        ema_params = ema.update(state.ema_params, params, decay(state.step))
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        curve = by_level(losses.loss, losses.logsnr, LOGSNR_EDGES)
        names = level_names(LOGSNR_EDGES)
        metrics |= {name: Share(*share) for name, *share in zip(names, *curve, strict=True)}
        history = state.history
        if history is not None:
            history = resampling.update(history, losses.t, losses.loss)
        return TrainState(state.step + 1, params, ema_params, opt_state, history), metrics

    return step


def compile_train_step(step: Any, shardings: TrainState, batch_sharding: Any, replicated: Any) -> Any:
    """Jit the update over the mesh. The state is donated: its buffers are reused for the new state."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
