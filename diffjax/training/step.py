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
from diffjax.training.skipping import keep, skipping
from diffjax.training.state import Params, TrainState, offloaded, on_device

Batch = dict[str, jax.Array]
Examples = Any

DrawFn = Callable[[Batch, jax.Array, LossHistory | None], tuple[Examples, jax.Array]]
"""`(batch, key, history) -> (examples, dropout key)`: all other chance; see `diffjax.stage.draw`."""

LossFn = Callable[[Params, Examples, jax.Array], BatchLoss]
"""`(params, examples, dropout key) -> losses of the examples`; see `diffjax.stage.loss`."""

Metrics = dict[str, jax.Array | Share]

StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
"""`(state, batch, the run's key) -> (state, metrics)`: an update."""

LOGSNR_EDGES = (-20.0, -12.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0, 12.0, 20.0)
"""Bounds of the noise levels whose losses are reported apart."""


def make_train_step(
    draw_fn: DrawFn,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    decay: ema.Decay,
    learning_rate: optax.Schedule,
    project: Callable[[Any], Any] = lambda params: params,
    accumulate: int = 1,
    skip_bad: bool = True,
) -> StepFn:
    """Build the update.

    What an update makes of the parameters passes through `project`, for networks whose parameters are bound
    to a set (EDM2's weights have a fixed magnitude). With `accumulate` above 1 the gradient is computed in so
    many parts of the batch, one after the other, each of which takes its share of the memory.

    If the loss or the gradient is not finite, only the step number changes, unless `skip_bad` is False. That
    is decided on the device, and is the metric `skipped`, 1 or 0: the host hears of it when it reads it.

    The returned function takes the run's key, the same at every step, and derives the step's randomness from
    it and the step number; a resumed run therefore draws what the uninterrupted one would have drawn.
    """

    update = skipping(optimizer).update

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        examples, dropout_key = draw_fn(batch, step_key, state.history)
        grads, losses = gradients(loss_fn, state.params, examples, dropout_key, accumulate)
        loss, grad_norm = jnp.mean(losses.objective), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) if skip_bad else True
        updates, opt_state = update(grads, state.opt_state, state.params, finite=finite)
        params = keep(finite, project(optax.apply_updates(state.params, updates)), state.params)
        average = ema.update(state.ema_params, params, decay(state.step))
        history = state.history
        if history is not None:
            history = keep(finite, resampling.update(history, losses.t, losses.loss), history)
        new = TrainState(state.step + 1, params, keep(finite, average, state.ema_params), opt_state, history)
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "skipped": 1.0 - jnp.asarray(finite, jnp.float32),
        }
        curve = by_level(losses.loss, losses.logsnr, LOGSNR_EDGES)
        names = level_names(LOGSNR_EDGES)
        metrics |= {name: Share(*share) for name, *share in zip(names, *curve, strict=True)}
        return new, metrics

    return step


def gradients(
    loss_fn: LossFn, params: Params, examples: Examples, key: jax.Array, parts: int = 1
) -> tuple[Params, BatchLoss]:
    """The gradient of the mean objective, and the losses of all examples in their order.

    Args:
      loss_fn: see `LossFn`.
      params: where the gradient is taken.
      examples: arrays `[batch, …]`.
      key: of dropout.
      parts: into how many parts, one after the other, the batch is divided.
    """

    def mean_loss(params: Params, examples: Examples, key: jax.Array) -> tuple[jax.Array, BatchLoss]:
        losses = loss_fn(params, examples, key)
        return jnp.mean(losses.objective), losses

    differentiate = jax.grad(mean_loss, has_aux=True)
    if parts == 1:
        return differentiate(params, examples, key)

    def add(total: Params, part: tuple[jax.Array, Examples]) -> tuple[Params, BatchLoss]:
        number, examples = part
        grads, losses = differentiate(params, examples, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, grads), losses

    # Part i has the examples i, i + parts, …: of those of each device an equal share, so that none moves.
    def divided(array: jax.Array) -> jax.Array:
        return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    def joined(array: jax.Array) -> jax.Array:
        return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, losses = jax.lax.scan(add, zeros, (jnp.arange(parts), jax.tree.map(divided, examples)))
    return jax.tree.map(lambda total: total / parts, grads), jax.tree.map(joined, losses)


def compile_train_step(step: Any, shardings: TrainState, batch_sharding: Any, replicated: Any) -> Any:
    """Jit the update over the mesh. The state is donated: its buffers are reused for the new state.

    What of the optimizer's memory lies on the host is brought to the devices for the update.
    """

    def run(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        near = jax.device_put(state.opt_state, on_device(shardings.opt_state))
        return step(state._replace(opt_state=near), batch, key)

    return jax.jit(
        run if offloaded(shardings.opt_state) else step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
